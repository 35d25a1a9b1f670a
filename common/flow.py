"""Flow matching in sigma: x_t = (1 - sigma) x0 + sigma eps, v = eps - x0. Shapes: B batch, K timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from einops import rearrange

if TYPE_CHECKING:  # importing torch takes seconds, which `--help` must not
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")


def shift(u: Number, s: float) -> Number:
    """Warp uniform times u in [0, 1] towards noise: s u / (1 + (s - 1) u) (SD3, arXiv 2403.03206, eq. 23)."""
    return s * u / (1 + (s - 1) * u)


def timestep_sigmas(timesteps: Sequence[float], *, s: float) -> tuple[float, ...]:
    """Shifted sigmas (K) of timesteps; ValueError unless they fall strictly from 1000 and stay above 0."""
    is_falling = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    # The first step is taken from pure noise, so a lower first timestep would tell the network a wrong noise level.
    if not timesteps or not is_falling or not math.isclose(timesteps[0], 1000) or timesteps[-1] <= 0:
        given = ",".join(f"{timestep:g}" for timestep in timesteps)
        raise ValueError(
            f"timesteps={given}: must start at 1000, which is pure noise, and fall strictly towards 0, as in "
            "1000,750,500,250; they are given before the shift, not as sigmas"
        )
    return tuple(shift(timestep / 1000, s) for timestep in timesteps)


def per_sample(sigma: Tensor) -> Tensor:
    """View sigma (B) as (B 1 1 1 1), which broadcasts over videos (B C T H W)."""
    return rearrange(sigma, "b -> b 1 1 1 1")


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B C T H W) at sigma (B)."""
    return (1 - per_sample(sigma)) * x0 + per_sample(sigma) * eps


def x0_from_velocity(x_t: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma v (B C T H W) at sigma (B)."""
    return x_t - per_sample(sigma) * v


def score_sigma(u: Tensor, *, s: float, low: float = 0.02, high: float = 0.98) -> Tensor:
    """Sigma (B) at which the scores are compared: shifted u (B) in [0, 1], clamped (DMD2, arXiv 2405.14867)."""
    return shift(u, s).clamp(low, high)
