"""The few-step student: denoise, add less noise, denoise again, down the timesteps; and Euler steps to compare with.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.condition import Condition, Denoiser
from common.flow import add_noise
from common.seed import draw_normal, make_generator
from stage2_distill.dmd.schedule import MicroBatch

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
    """x0 (B C T H W) after steps 0..exit_index (default: all), starting from `noise`.

    Only the last step can carry a gradient (backward simulation, DMD2, section 4.5). Fresh noise between the steps
    comes from `generators`, one per sample.
    """
    last = len(sigmas) - 1 if exit_index is None else exit_index  # 0 is a possible exit
    x_t = simulate_state(denoiser, noise, condition, sigmas=sigmas[: last + 1], generators=generators)
    return denoiser(x_t, _batch_sigma(noise, sigmas[last]), condition)


@torch.no_grad()  # backward simulation: gradients flow through the last step only
def simulate_state(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    sigmas: Sequence[float],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """x_t (B C T H W) at sigmas[-1]: what a rollout's last step starts from."""
    x_t = noise
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoiser(x_t, _batch_sigma(noise, sigma), condition)
        x_t = add_noise(x0, draw_normal(x0.shape[1:], generators), _batch_sigma(noise, next_sigma))
    return x_t


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition,
    *,
    sigmas: Sequence[float],
    generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:
    """Yield x0 (B C T H W) of each step, computed when requested: the result of `rollout` with that exit index."""
    x_t = noise
    for step, sigma in enumerate(sigmas):
        x0 = denoiser(x_t, _batch_sigma(noise, sigma), condition)
        yield x0
        if step + 1 < len(sigmas):
            x_t = add_noise(x0, draw_normal(x0.shape[1:], generators), _batch_sigma(noise, sigmas[step + 1]))


@torch.no_grad()
def sample_euler(denoiser: Denoiser, noise: Tensor, condition: Condition, *, sigmas: Sequence[float]) -> Tensor:
    """x0 (B C T H W) after Euler steps of the flow from `noise` along `sigmas` and finally to 0."""
    return follow_path(denoiser, noise, condition, sigmas=[*sigmas, 0.0])


@torch.no_grad()
def follow_path(denoiser: Denoiser, x_t: Tensor, condition: Condition, *, sigmas: Sequence[float]) -> Tensor:
    """The latent (B C T H W) at sigmas[-1] after Euler steps of the flow from x_t at sigmas[0]."""
    for sigma, next_sigma in pairwise(sigmas):
        x0 = denoiser(x_t, _batch_sigma(x_t, sigma), condition)
        x_t = x0 + (next_sigma / sigma) * (x_t - x0)
    return x_t


@torch.no_grad()
def solve_flow(denoiser: Denoiser, x_t: Tensor, condition: Condition, *, sigmas: Sequence[float]) -> Tensor:
    """The latent (B C T H W) at sigma 0 of the flow's path through x_t at sigmas[0], by two-step Adams-Bashforth.

    Of second order for one pass of the network per step, as Euler's; the first step is Euler's.
    """
    last_velocity, last_step = x_t, 0.0
    for sigma, next_sigma in pairwise([*sigmas, 0.0]):
        velocity = (x_t - denoiser(x_t, _batch_sigma(x_t, sigma), condition)) / sigma
        step = next_sigma - sigma
        slope = velocity + step / (2 * last_step) * (velocity - last_velocity) if last_step else velocity
        last_velocity, last_step = velocity, step
        x_t = x_t + step * slope
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
    """x0 (B C T H W) of a rollout whose noise depends only on each sample's key and the purpose.

    latent_shape: (C T H W). keys: one (seed, iteration, sample) per sample, as for `common.seed.make_generator`.
    """
    noise, generators = draw_start_noise(keys, purpose, latent_shape, condition.text.device)
    return rollout(denoiser, noise, condition, sigmas=sigmas, generators=generators, exit_index=exit_index)


def draw_start_noise(
    keys: Sequence[SampleKey], purpose: str, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, list[torch.Generator]]:
    """The noise (B C T H W) that a rollout starts from, and the generators for the noise between its steps."""
    generators = [make_generator(*key, purpose, device) for key in keys]
    return draw_normal(shape, generators), generators  # their state now continues after the start noise


@dataclass(frozen=True)
class Simulated:
    """The student's samples for one micro-batch."""

    x0: Tensor  # (B C T H W)
    condition: Condition  # what they were generated from
    exit_index: int  # index of the timestep at which the rollout ended
    x_t: Tensor | None = None  # (B C T H W) what the last step started from; None if it is not needed


@dataclass(frozen=True)
class StudentRollouts:
    """The student's rollouts in training, and the options that they depend on."""

    student: Denoiser
    seed: int
    sigmas: tuple[float, ...]

    def simulate(self, micro_batch: MicroBatch, condition: Condition, exit_index: int) -> Simulated:
        """Samples for a micro-batch, from pure noise down to step `exit_index`."""
        keys, purpose = micro_batch.sample_keys(self.seed), f"{micro_batch.role} rollout"
        noise, generators = draw_start_noise(keys, purpose, micro_batch.spec.latent_shape, condition.text.device)
        sigmas = self.sigmas[: exit_index + 1]
        x_t = simulate_state(self.student, noise, condition, sigmas=sigmas, generators=generators)
        x0 = self.student(x_t, _batch_sigma(noise, sigmas[-1]), condition)
        return Simulated(x0, condition, exit_index, x_t)

    def start_trajectory(self, micro_batch: MicroBatch, condition: Condition) -> Iterator[Tensor]:
        """Yield the samples of every step, from the noise that `simulate` starts from."""
        keys, purpose = micro_batch.sample_keys(self.seed), f"{micro_batch.role} rollout"
        noise, generators = draw_start_noise(keys, purpose, micro_batch.spec.latent_shape, condition.text.device)
        return trajectory(self.student, noise, condition, sigmas=self.sigmas, generators=generators)


def _batch_sigma(noise: Tensor, sigma: float) -> Tensor:
    """Sigma (B) of every sample."""
    return noise.new_full((noise.shape[0],), sigma)
