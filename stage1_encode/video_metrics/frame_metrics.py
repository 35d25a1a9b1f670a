"""What the pixels of a video say, with fixed random features where features are needed: nothing is downloaded.

Shapes: B videos or pictures, F frames, X Y pixel height and width; all figures are (B).
"""

import math
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

FEATURE_SEED, FEATURE_WIDTHS = 20261123, (3, 32, 64, 64)  # of the fixed features: three scales
MAX_PSNR_DB = 100.0  # of pictures that are equal


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of pictures (B X Y 3) uint8, at most 100."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR_DB)


@cache
def random_filters() -> tuple[Tensor, ...]:
    """Random convolutions (D C 3 3) of a fixed seed, one a scale."""
    draws = torch.Generator().manual_seed(FEATURE_SEED)
    shapes = [(wide, narrow, 3, 3) for narrow, wide in zip(FEATURE_WIDTHS, FEATURE_WIDTHS[1:], strict=False)]
    return tuple(torch.randn(shape, generator=draws) / math.sqrt(9 * shape[1]) for shape in shapes)


def multiscale_features(picture: Tensor) -> list[Tensor]:
    """Unit features (B C x y) of pictures (B X Y 3) uint8 at three scales."""
    x = rearrange(picture.float(), "b x y c -> b c x y") / 127.5 - 1
    features = []
    for weight in random_filters():
        x = functional.relu(functional.conv2d(x, weight.to(x.device), stride=2, padding=1))
        features.append(functional.normalize(x, dim=1))
    return features


def perceptual_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of pictures (B X Y 3) uint8 in the form of LPIPS (arXiv 1801.03924) with random, untrained features."""
    pairs = zip(multiscale_features(a), multiscale_features(b), strict=True)
    distances = [(feature - other_feature).square().sum(dim=1).mean(dim=(1, 2)) for feature, other_feature in pairs]
    return torch.stack(distances).mean(dim=0)


def frame_motion(video: Tensor) -> Tensor:
    """Mean absolute difference from one frame to the next of videos (B F X Y 3) uint8, in [0, 1]."""
    if video.shape[1] < 2:
        return torch.zeros(len(video), device=video.device)
    return video.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4)) / 255


def colour_saturation(video: Tensor) -> Tensor:
    """Mean of largest minus smallest colour over the pixels of videos (B F X Y 3) uint8, in [0, 1]."""
    return (video.amax(dim=-1) - video.amin(dim=-1)).float().mean(dim=(1, 2, 3)) / 255


def frame_contrast(video: Tensor) -> Tensor:
    """Standard deviation of brightness within a frame, mean over the frames of videos (B F X Y 3) uint8, in [0, 1]."""
    return video.float().mean(dim=-1).std(dim=(2, 3), correction=0).mean(dim=1) / 255
