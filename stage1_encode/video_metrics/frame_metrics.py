"""What the pixels of a video say, with fixed random features where features are needed: nothing is downloaded.

Shapes: B videos or pictures, F frames, X Y pixel height and width; all figures are (B).
"""

import math
from functools import cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

SEED, WIDTHS = 20261123, (3, 32, 64, 64)  # of the fixed features: three scales
MOST_DB = 100.0  # of pictures that are equal


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of pictures (B X Y 3) uint8, at most 100."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MOST_DB)


@cache
def weights() -> tuple[Tensor, ...]:
    """Random convolutions (D C 3 3) of a fixed seed, one a scale."""
    draws = torch.Generator().manual_seed(SEED)
    shapes = [(wide, narrow, 3, 3) for narrow, wide in zip(WIDTHS, WIDTHS[1:], strict=False)]
    return tuple(torch.randn(shape, generator=draws) / math.sqrt(9 * shape[1]) for shape in shapes)


def scales(picture: Tensor) -> list[Tensor]:
    """Unit features (B C x y) of pictures (B X Y 3) uint8 at three scales."""
    x = rearrange(picture.float(), "b x y c -> b c x y") / 127.5 - 1
    found = []
    for weight in weights():
        x = functional.relu(functional.conv2d(x, weight.to(x.device), stride=2, padding=1))
        found.append(functional.normalize(x, dim=1))
    return found


def perceptual(a: Tensor, b: Tensor) -> Tensor:
    """Distance of pictures (B X Y 3) uint8 in the form of LPIPS (arXiv 1801.03924) with random, untrained features."""
    pairs = zip(scales(a), scales(b), strict=True)
    apart = [(one - other).square().sum(dim=1).mean(dim=(1, 2)) for one, other in pairs]
    return torch.stack(apart).mean(dim=0)


def motion(video: Tensor) -> Tensor:
    """Mean absolute difference from one frame to the next of videos (B F X Y 3) uint8, in [0, 1]."""
    if video.shape[1] < 2:
        return torch.zeros(len(video), device=video.device)
    return video.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4)) / 255


def saturation(video: Tensor) -> Tensor:
    """Mean of largest minus smallest colour over the pixels of videos (B F X Y 3) uint8, in [0, 1]."""
    return (video.amax(dim=-1) - video.amin(dim=-1)).float().mean(dim=(1, 2, 3)) / 255


def contrast(video: Tensor) -> Tensor:
    """Standard deviation of brightness within a frame, mean over the frames of videos (B F X Y 3) uint8, in [0, 1]."""
    return video.float().mean(dim=-1).std(dim=(2, 3), correction=0).mean(dim=1) / 255
