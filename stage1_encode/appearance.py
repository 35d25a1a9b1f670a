"""What the pixels of a video say, with fixed random features where features are needed: nothing is downloaded.

Shapes: F frames, X Y pixel height and width.
"""

import math

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

SEED, WIDTHS = 20261123, (3, 32, 64, 64)  # of the fixed features: three scales
MOST_DB = 100.0  # of pictures that are equal


def psnr(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Peak signal to noise ratio in dB of pictures (X Y 3) uint8, at most 100."""
    error = float(numpy.square(a.astype(numpy.float64) - b).mean())
    return MOST_DB if error == 0 else min(MOST_DB, 10 * math.log10(255**2 / error))


def scales(picture: numpy.ndarray) -> list[Tensor]:
    """Unit features (1 C x y) of a picture (X Y 3) uint8 at three scales, by random convolutions of a fixed seed."""
    draws = torch.Generator().manual_seed(SEED)
    x = rearrange(torch.from_numpy(picture.astype(numpy.float32)), "x y c -> 1 c x y") / 127.5 - 1
    found = []
    for narrow, wide in zip(WIDTHS, WIDTHS[1:], strict=False):
        weight = torch.randn((wide, narrow, 3, 3), generator=draws) / math.sqrt(9 * narrow)
        x = functional.relu(functional.conv2d(x, weight, stride=2, padding=1))
        found.append(functional.normalize(x, dim=1))
    return found


def perceptual(a: numpy.ndarray, b: numpy.ndarray) -> float:
    """Distance of pictures (X Y 3) uint8 in the form of LPIPS (arXiv 1801.03924) with random, untrained features."""
    pairs = zip(scales(a), scales(b), strict=True)
    return float(sum((one - other).square().sum(dim=1).mean() for one, other in pairs)) / (len(WIDTHS) - 1)


def motion(video: numpy.ndarray) -> float:
    """Mean absolute difference from one frame to the next of a video (F X Y 3) uint8, in [0, 1]."""
    steps = numpy.diff(video.astype(numpy.float32), axis=0)
    return float(numpy.abs(steps).mean()) / 255 if len(video) > 1 else 0.0


def saturation(video: numpy.ndarray) -> float:
    """Mean of largest minus smallest colour over the pixels of a video (F X Y 3) uint8, in [0, 1]."""
    return float((video.max(axis=-1) - video.min(axis=-1)).mean()) / 255


def contrast(video: numpy.ndarray) -> float:
    """Standard deviation of brightness within a frame, mean over the frames of (F X Y 3) uint8, in [0, 1]."""
    return float(video.astype(numpy.float32).mean(axis=-1).std(axis=(1, 2)).mean()) / 255
