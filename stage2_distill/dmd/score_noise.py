"""The noise at which the scores of teacher and critic are compared, and at which the critic is trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.flow import score_sigma
from common.seed import draw_normal, draw_uniform, make_generator
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import STUDENT, MicroBatch

LOW_SIGMAS = (0.01, 0.5)


def low_score_sigmas(uniform: Tensor) -> Tensor:
    """Sigmas (B) of density 1 / (sigma ln(b / a)) on [a, b] = LOW_SIGMAS, from uniform draws (B) in [0, 1).

    As many draws fall between 0.01 and 0.02 as between 0.1 and 0.2, where the shifted law has one in a hundred.
    """
    low, high = LOW_SIGMAS
    return low * (uniform * math.log(high / low)).exp()


@dataclass(frozen=True)
class ScoreNoise:
    """Options of the score times, and their draws: a pure function of seed, iteration and sample."""

    seed: int
    timesteps: tuple[float, ...]
    shift: float
    ts_schedule: bool
    ts_schedule_max: bool
    score_time_low_share: float  # in the student's updates
    critic_time_low_share: float
    score_low: float
    score_high: float

    def bounds(self, exit_index: int) -> tuple[float, float]:
        """Bounds of u in [0, 1], the score time before the shift, for a rollout that left at step `exit_index`."""
        next_timestep = self.timesteps[exit_index + 1] if exit_index + 1 < len(self.timesteps) else 0.0
        low = next_timestep / 1000 if self.ts_schedule else 0.0
        high = self.timesteps[exit_index] / 1000 if self.ts_schedule_max else 1.0
        return low, high

    def draw_guidance(self, micro_batch: MicroBatch, samples: Simulated) -> tuple[Tensor, Tensor]:
        """Sigma (B) and noise (B C T H W) at which the guidance is followed: from the exit's time upwards."""
        generators = [
            make_generator(*key, f"{micro_batch.role} guidance", samples.x0.device)
            for key in micro_batch.sample_keys(self.seed)
        ]
        low = self.timesteps[samples.exit_index] / 1000
        u = low + (1 - low) * draw_uniform(generators)
        sigma = score_sigma(u, s=self.shift, low=self.score_low, high=self.score_high)
        return sigma, draw_normal(samples.x0.shape[1:], generators)

    def draw(self, micro_batch: MicroBatch, samples: Simulated) -> tuple[Tensor, Tensor]:
        """Sigma (B) and noise (B C T H W) for the samples of a micro-batch."""
        purpose, device = f"{micro_batch.role} score", samples.x0.device
        generators = [make_generator(*key, purpose, device) for key in micro_batch.sample_keys(self.seed)]
        low, high = self.bounds(samples.exit_index)  # of a reused rollout the exit is its own
        uniform = draw_uniform(generators)  # drawn first: the generators' order is part of the recipe
        u = low + (high - low) * uniform
        sigma = score_sigma(u, s=self.shift, low=self.score_low, high=self.score_high)
        share = self.score_time_low_share if micro_batch.role == STUDENT else self.critic_time_low_share
        if share:
            choices = [make_generator(*key, f"{purpose} law", device) for key in micro_batch.sample_keys(self.seed)]
            sigma = torch.where(draw_uniform(choices) < share, low_score_sigmas(uniform), sigma)
        return sigma, draw_normal(samples.x0.shape[1:], generators)
