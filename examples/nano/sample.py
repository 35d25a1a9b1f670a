"""Samplers that the gate compares; text is compact (L rows).

Shapes: B clips, C channels, T latent frames, H W latent size.
"""

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from common.flow import shift
from examples.nano.dit import SHIFT, velocity

Network = Callable[[Tensor, float], Tensor]  # (x_t (B C T H W), sigma) -> x0 with frame 0 pinned
LADDER = (1.0, 0.9375, 0.8333333, 0.625)


def euler_grid(steps: int) -> list[float]:
    """Return the shifted grid of `steps` sigmas, from 1 down, without the closing 0."""
    return [shift(1 - i / steps, SHIFT) for i in range(steps)]


def network(net: WanTransformer3DModel, text: Tensor, first: Tensor | None, negative: Tensor, scale: float) -> Network:
    """Return the guided denoiser to x0 for texts (B L D) and first frames (B C 1 H W) or None; scale 1: no guidance."""

    def x0(x: Tensor, sigma: float) -> Tensor:
        if first is not None:
            x = torch.cat([first, x[:, :, 1:]], dim=2)
        times = torch.full((len(x),), sigma, device=x.device)
        pinned = torch.full_like(times, float(first is not None))
        v = velocity(net, x, times, text, pinned)
        if scale != 1:
            empty = velocity(net, x, times, negative.expand_as(text), pinned)
            v = empty + scale * (v - empty)
        out = x - sigma * v
        return out if first is None else torch.cat([first, out[:, :, 1:]], dim=2)

    return x0


@torch.no_grad()
def euler(x0: Network, noise: Tensor, sigmas: list[float]) -> Tensor:
    """Sample deterministically from noise along sigmas and then to 0."""
    x = noise
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        clean = x0(x, sigma)
        x = clean + (after / sigma) * (x - clean)
    return clean


@torch.no_grad()
def renoise(x0: Network, noise: Tensor, sigmas: list[float], generator: torch.Generator) -> Tensor:
    """Sample as the student does: predict x0, add new noise at the next sigma, repeat."""
    x = noise
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        clean = x0(x, sigma)
        fresh = torch.randn(x.shape, generator=generator, device=x.device)
        x = (1 - after) * clean + after * fresh
    return clean
