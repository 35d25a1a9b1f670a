"""Metrics of pixels: fidelity of the first frame, and motion, saturation and contrast of videos.

Shapes: B videos, F frames, X Y pixels. Every metric is (B).
"""

import math

import torch
from torch import Tensor

MAX_PSNR_DB = 100.0  # of equal pictures, instead of infinity


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of pictures (B X Y 3) uint8, at most 100."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR_DB)


def frame_motion(video: Tensor) -> Tensor:
    """Return the mean absolute difference between consecutive frames of videos (B F X Y 3) uint8, in [0, 1]."""
    if video.shape[1] < 2:
        return torch.zeros(len(video), device=video.device)
    return video.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4)) / 255


def colour_saturation(video: Tensor) -> Tensor:
    """Return the mean over pixels of (largest - smallest channel) of videos (B F X Y 3) uint8, in [0, 1]."""
    return (video.amax(dim=-1) - video.amin(dim=-1)).float().mean(dim=(1, 2, 3)) / 255  # not HSV: black counts as 0


def frame_contrast(video: Tensor) -> Tensor:
    """Return the standard deviation of brightness within a frame, averaged over the frames of videos, in [0, 1]."""
    # the population's deviation (correction=0), which is defined for a single pixel too
    return video.float().mean(dim=-1).std(dim=(2, 3), correction=0).mean(dim=1) / 255
