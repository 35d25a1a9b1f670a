"""Distances between sets of latents, with one fixed random feature map that needs no download.

Shapes: N videos, B of them at once, C channels, T latent frames, H W latent size, D = 64 features.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SEED, HIDDEN, WIDTH = 20261123, 128, 64


def random_weight(out: int, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """A Gaussian convolution weight (out, *shape) that keeps the variance of unit inputs."""
    return torch.randn((out, *shape), generator=generator) / math.sqrt(math.prod(shape))


def features(latents: Tensor) -> Tensor:
    """Features (N D) of normalised latents (N C T H W): two random convolutions of the free frames, averaged.

    The weights are drawn from a fixed seed on the CPU, so every machine has the same map; float32 throughout.
    """
    generator = torch.Generator().manual_seed(SEED)
    first = random_weight(HIDDEN, (latents.shape[1], 1, 2, 2), generator).to(latents.device)
    second = random_weight(WIDTH, (HIDDEN, 2, 1, 1), generator).to(latents.device)
    hidden = functional.relu(functional.conv3d(latents[:, :, 1:].float(), first))
    return functional.relu(functional.conv3d(hidden, second)).mean(dim=(2, 3, 4))


def square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root (D D) of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to a (N D) and b (M D), in float64 (Dowson & Landau 1982)."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = square_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points, 1..10 degrees


@dataclass(frozen=True)
class Spread:
    """One figure a seed, summed up."""

    mean: float
    deviation: float | None  # standard deviation over the seeds; None = one seed
    low: float | None  # of the 95 % interval of the mean, Student's t
    high: float | None
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and 95 % interval (Student's t) of one figure a seed."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Spread(mean, None, None, None, tuple(values))
    deviation = statistics.stdev(values)
    half = (STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 2.2) * deviation / math.sqrt(count)
    return Spread(mean, deviation, mean - half, mean + half, tuple(values))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squared difference (B) of the free frames 1..T-1 of latents a and b (B C T H W)."""
    return (a[:, :, 1:].float() - b[:, :, 1:].float()).square().mean(dim=(1, 2, 3, 4)).sqrt()


def diversity(sets: Sequence[Tensor]) -> Tensor:
    """Mean distance (B) between the pairs of two or more sets (B C T H W): how much the seed decides."""
    pairs = [distance(a, b) for place, a in enumerate(sets) for b in sets[:place]]
    return torch.stack(pairs).mean(dim=0)
