"""The few-step student: denoise, noise again less, and so on down the ladder; and plain Euler steps, to compare.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.condition import Condition, Denoiser
from common.flow import add_noise
from common.seed import draw_normal, make_generator

SampleKey = tuple[int, int, int]  # seed, iteration, sample


def rollout(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    sigmas: Sequence[float],
    generators: Sequence[torch.Generator],
    exit_index: int | None = None,
) -> Tensor:
    """x0 (B C T H W) after the ladder's steps 0..exit_index (default: all), starting from `noise`.

    Only the last step can carry a gradient (backward simulation, DMD2 section 4.5). Fresh noise between the steps
    comes from `generators`, one a sample.
    """
    last = len(sigmas) - 1 if exit_index is None else exit_index
    sigma_batches = [noise.new_full((noise.shape[0],), sigma) for sigma in sigmas]
    x_t = noise
    with torch.no_grad():
        for step in range(last):
            x0 = denoiser(x_t, sigma_batches[step], condition)
            x_t = add_noise(x0, draw_normal(x0.shape[1:], generators), sigma_batches[step + 1])
    return denoiser(x_t, sigma_batches[last], condition)


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    sigmas: Sequence[float],
    generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:
    """x0 (B C T H W) of each step down the ladder, computed when asked for: what `rollout` gives at that exit."""
    x_t = noise
    for step, sigma in enumerate(sigmas):
        x0 = denoiser(x_t, noise.new_full((noise.shape[0],), sigma), condition)
        yield x0
        if step + 1 < len(sigmas):
            x_t = add_noise(
                x0, draw_normal(x0.shape[1:], generators), noise.new_full((noise.shape[0],), sigmas[step + 1])
            )


@torch.no_grad()
def sample_euler(denoiser: Denoiser, noise: Tensor, condition: Condition, *, sigmas: Sequence[float]) -> Tensor:
    """x0 (B C T H W) after Euler steps of the flow from `noise` along `sigmas` and at last to 0."""
    x_t = noise
    for sigma, next_sigma in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x0 = denoiser(x_t, noise.new_full((noise.shape[0],), sigma), condition)
        x_t = x0 + (next_sigma / sigma) * (x_t - x0)
    return x_t


def sample_student(
    denoiser: Denoiser,
    condition: Condition,
    *,
    sigmas: Sequence[float],
    latent_shape: Sequence[int],
    keys: Sequence[SampleKey],
    purpose: str,
    exit_index: int | None = None,
) -> Tensor:
    """x0 (B C T H W) of a rollout whose noise depends on each sample's key and the purpose alone.

    latent_shape: (C T H W). keys: one (seed, iteration, sample) per sample, as for `common.seed.make_generator`.
    """
    device = condition.text.device
    generators = [make_generator(*key, purpose, device) for key in keys]
    noise = draw_normal(latent_shape, generators)
    return rollout(denoiser, noise, condition, sigmas=sigmas, generators=generators, exit_index=exit_index)
