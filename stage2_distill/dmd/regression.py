"""Regression of the student onto the end of the teacher's own path, beside distribution matching.

From the state in which a rollout's last step starts, the teacher's ODE is solved down to sigma 0: a sample of the
teacher's distribution, which the student is asked to reach in one step. The first steps of knowledge distillation
(Luhman and Luhman, arXiv 2101.02388; DMD, arXiv 2311.18828, section 3.3, from precomputed pairs), here at the student's
own states and computed on the spot, so that no clips and no pairs are stored. Matching alone follows the critic's
error as well as its signal (benchmarks/LOG.md, 2026-11-30); this anchor does not move.
Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from dataclasses import dataclass

from torch import Tensor

from common.condition import Denoiser, free_mean
from common.flow import shift
from stage2_distill.dmd.rollout import Simulated, follow_path, solve_flow

ANCHOR_STEPS = 24  # of the teacher's whole path, of which the anchor takes the first ones


@dataclass(frozen=True)
class TeacherRegression:
    """Options of the regression."""

    regression_weight: float
    regression_steps: int  # from the exit to sigma 0, a pass of the teacher each
    timesteps: tuple[float, ...]
    shift: float

    def path(self, exit_index: int) -> tuple[float, ...]:
        """Sigmas of the teacher's steps from an exit, which are uniform in time before the shift; 0 is left out."""
        start, count = self.timesteps[exit_index] / 1000, self.regression_steps
        return tuple(shift(start * (1 - step / count), self.shift) for step in range(count))

    def distance(self, samples: Simulated, teacher: Denoiser) -> Tensor:
        """Mean of (x0 - end of the teacher's path)^2 over the free frames, a scalar; the target carries no gradient."""
        assert samples.x_t is not None, "the student's rollouts are never reused ones"
        target = solve_flow(teacher, samples.x_t, samples.condition, sigmas=self.path(samples.exit_index))
        return free_mean((samples.x0 - target) ** 2, samples.condition).mean()


@dataclass(frozen=True)
class FirstStepAnchor:
    """Options of the anchor of the student's first step, which keeps the diversity of the teacher's first steps."""

    anchor_weight: float
    anchor_steps: int
    shift: float

    def path(self) -> tuple[float, ...]:
        """Sigmas of the teacher's first steps from pure noise, uniform in time before the shift, and where they end."""
        return tuple(shift(1 - step / ANCHOR_STEPS, self.shift) for step in range(self.anchor_steps + 1))

    def distance(self, samples: Simulated, teacher: Denoiser) -> Tensor:
        """Mean over the free frames of (v - (eps - x_k) / (1 - sigma_k))^2, a scalar; 0 after other exits.

        v = eps - x0 is the student's velocity in its first step, from the noise eps, and x_k the teacher's latent after
        k guided steps from the same noise: that step sets layout and motion, and follows one seed's path rather than
        the mean of all (diversity loss of ModelTC/LightX2V). Only updates that end there have its gradient.
        """
        assert samples.x_t is not None
        if samples.exit_index:
            return samples.x0.new_zeros(())
        noise, path = samples.x_t, self.path()
        latent = follow_path(teacher, noise, samples.condition, sigmas=path)
        target = (noise - latent) / (1 - path[-1])
        error = (noise - samples.x0 - target) ** 2
        return free_mean(error, samples.condition).mean()
