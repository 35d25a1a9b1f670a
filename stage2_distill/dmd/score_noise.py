"""The noise at which the scores of teacher and critic are compared, and at which the critic is trained."""

from dataclasses import dataclass

from torch import Tensor

from common.flow import score_sigma
from common.seed import draw_normal, draw_uniform, make_generator
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import MicroBatch


@dataclass(frozen=True)
class ScoreNoise:
    """Options of the score times, and their draws: a pure function of seed, iteration and sample."""

    seed: int
    timesteps: tuple[float, ...]
    shift: float
    ts_schedule: bool
    ts_schedule_max: bool
    score_low: float
    score_high: float

    def bounds(self, exit_index: int) -> tuple[float, float]:
        """Bounds of u in [0, 1], the score time before the shift, for a rollout that left at step `exit_index`."""
        next_timestep = self.timesteps[exit_index + 1] if exit_index + 1 < len(self.timesteps) else 0.0
        low = next_timestep / 1000 if self.ts_schedule else 0.0
        high = self.timesteps[exit_index] / 1000 if self.ts_schedule_max else 1.0
        return low, high

    def draw(self, micro_batch: MicroBatch, samples: Simulated) -> tuple[Tensor, Tensor]:
        """Sigma (B) and noise (B C T H W) for the samples of a micro-batch."""
        purpose, device = f"{micro_batch.role} score", samples.x0.device
        generators = [make_generator(*key, purpose, device) for key in micro_batch.sample_keys(self.seed)]
        low, high = self.bounds(samples.exit_index)  # of a reused rollout the exit is its own
        u = low + (high - low) * draw_uniform(generators)
        # u is drawn first: the generators' order is part of the recipe
        sigma = score_sigma(u, s=self.shift, low=self.score_low, high=self.score_high)
        return sigma, draw_normal(samples.x0.shape[1:], generators)
