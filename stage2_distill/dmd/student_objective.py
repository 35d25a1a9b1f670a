"""What an update of the student minimizes.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from dataclasses import dataclass

from torch import Tensor

from common.condition import Denoiser
from stage2_distill.dmd.losses import (
    DenoiserPair,
    compare_scores,
    guidance_gradient,
    normalized_direction,
    surrogate_loss,
    temporal_variance_loss,
)
from stage2_distill.dmd.regression import FirstStepAnchor, TeacherRegression
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.dmd.score_noise import ScoreNoise

LossPair = tuple[Tensor, Tensor]  # scalars: the one whose gradient is taken, the one that is reported


@dataclass(frozen=True)
class StudentObjective:
    """The networks that the student follows, and the losses by which it does."""

    teacher: Denoiser  # with guidance
    matched_teacher: Denoiser  # the same, or without guidance if that is followed at other noise levels
    guidance: DenoiserPair | None  # what is followed there
    fake: Denoiser  # stands for the score of the student's distribution
    score_noise: ScoreNoise
    regression: TeacherRegression
    anchor: FirstStepAnchor
    exit_weights: tuple[float, ...] | None
    temporal_variance_weight: float
    temporal_variance_cutoff: float

    def matching_loss(self, samples: Simulated, micro_batch: MicroBatch) -> LossPair:
        """The loss of Distribution Matching Distillation on the samples of a micro-batch, reported without the others.

        weight of the exit * matching + the other terms: the gradient of the first exit, where one step makes the whole
        video, is held to reduce motion and diversity (Phased DMD, arXiv 2510.27684), and can be weighted down.
        """
        x0, condition = samples.x0, samples.condition
        sigma, eps = self.score_noise.draw(micro_batch, samples)
        networks = {"teacher": self.matched_teacher, "critic": self.fake}
        scores = compare_scores(x0, condition, **networks, sigma=sigma, eps=eps)
        gradient = normalized_direction(x0, condition, scores.fake, scores.real)
        if self.guidance is not None:
            sigma, eps = self.score_noise.draw_guidance(micro_batch, samples)
            gradient = gradient + guidance_gradient(x0, condition, teacher=self.guidance, sigma=sigma, eps=eps)
        matching = surrogate_loss(x0, condition, gradient)
        total = matching if self.exit_weights is None else self.exit_weights[samples.exit_index] * matching
        if self.temporal_variance_weight:
            motion = temporal_variance_loss(x0, scores.real, cutoff=self.temporal_variance_cutoff)
            total = total + self.temporal_variance_weight * motion
        if self.regression.regression_weight:
            total = total + self.regression.regression_weight * self.regression.distance(samples, self.teacher)
        if self.anchor.anchor_weight:
            total = total + self.anchor.anchor_weight * self.anchor.distance(samples, self.teacher)
        return total, matching

    def warmup_loss(self, samples: Simulated, _: MicroBatch) -> LossPair:
        """The loss of an iteration of `teacher_warmup`: the regression alone."""
        loss = self.regression.distance(samples, self.teacher)
        return loss, loss
