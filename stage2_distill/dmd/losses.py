"""The two losses of Distribution Matching Distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

Networks appear only as `Denoiser`s. Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from common.condition import Condition, Denoiser, free_frames, free_mean
from common.flow import add_noise, per_sample

DenoiserPair = Callable[[Tensor, Tensor, Condition], tuple[Tensor, Tensor]]  # -> x0 with guidance, x0 without


@dataclass(frozen=True)
class Scores:
    """Denoised predictions at the same noised samples, which stand for the scores of two distributions."""

    fake: Tensor  # (B C T H W) of the student's, by the critic
    real: Tensor  # (B C T H W) of the teacher's


@torch.no_grad()
def compare_scores(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> Scores:
    """The predictions of critic and teacher at x_t = add_noise(x0, eps, sigma)."""
    x_t = add_noise(x0, eps, sigma)
    return Scores(critic(x_t, sigma, condition), teacher(x_t, sigma, condition))


@torch.no_grad()
def normalized_direction(x0: Tensor, condition: Condition, start: Tensor, end: Tensor) -> Tensor:
    """(start - end) / mean|x0 - end| (B C T H W), the mean per sample over the free frames, and 0 in given frames.

    From fake to real it is the gradient of DMD, eq. 7 and 8: the way back from the teacher's distribution.
    """
    direction = (start - end) / per_sample(free_mean((x0 - end).abs(), condition))
    return torch.where(rearrange(free_frames(x0, condition), "b t -> b 1 t 1 1"), direction, 0)


def guidance_gradient(x0: Tensor, condition: Condition, *, teacher: DenoiserPair, sigma: Tensor, eps: Tensor) -> Tensor:
    """Direction (B C T H W) from the teacher's guided prediction to the one without guidance, at noise of its own.

    -(g - 1) (cond - uncond) / mean|x0 - guided| at x_t = add_noise(x0, eps, sigma), without gradient. This is the CFG
    augmentation of Decoupled DMD (arXiv 2511.22677), which draws sigma above that of the exit. It is added to the DMD
    gradient against the teacher without guidance, whose sigma is drawn over the whole range.
    """
    with torch.no_grad():
        guided, cond = teacher(add_noise(x0, eps, sigma), sigma, condition)
    return normalized_direction(x0, condition, cond, guided)


def dmd_loss(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> Tensor:
    """Scalar whose derivative by the free elements of x0 is the gradient of DMD / their number (DMD2, section 3).

    Training takes the same three steps (`student_objective.py`). Every sample has the same weight, whether its first
    frame is given or free.
    """
    scores = compare_scores(x0, condition, teacher=teacher, critic=critic, sigma=sigma, eps=eps)
    return surrogate_loss(x0, condition, normalized_direction(x0, condition, scores.fake, scores.real))


def surrogate_loss(x0: Tensor, condition: Condition, gradient: Tensor) -> Tensor:
    """Scalar whose derivative by the free elements of x0 is `gradient` / their number."""
    target = (x0 - gradient).detach()  # d/dx0 of 0.5 (x0 - target)^2 is x0 - target, the gradient itself
    return 0.5 * free_mean((x0 - target) ** 2, condition).mean()


def temporal_variance(x0: Tensor) -> Tensor:
    """Variance (B) of x0 (B C T H W) over time, its mean over channels and positions; 0 for a still video."""
    return x0.var(dim=2, correction=0).mean(dim=(1, 2, 3))


def temporal_variance_loss(x0: Tensor, real: Tensor, *, cutoff: float) -> Tensor:
    """Mean over samples of -log(v + 1e-6) where v < cutoff * v_teacher, else 0; v: temporal variance (B) of x0.

    v_teacher is that of `real`, the teacher's prediction for the same condition from the student's own noised sample. A
    mean varies less than the videos that it is the mean of, so a sample that moves less than it moves too little. The
    term is that of arXiv 2603.21864, whose cut-off is one number for all videos and makes still scenes move.
    """
    variance, teacher_variance = temporal_variance(x0), temporal_variance(real)
    lacks_motion = variance.detach() < cutoff * teacher_variance
    return torch.where(lacks_motion, -(variance + 1e-6).log(), 0).mean()


def critic_weight(sigma: Tensor, kind: str) -> Tensor:
    """Weight (B) of the squared x0 error: 1 (`x0`), 1/sigma^2 (`flow`), ((1-sigma)/sigma)^2 (`noise`)."""
    if kind == "flow":
        return sigma**-2
    return ((1 - sigma) / sigma) ** 2 if kind == "noise" else torch.ones_like(sigma)


def critic_loss(
    x0: Tensor, condition: Condition, *, critic: Denoiser, sigma: Tensor, eps: Tensor, kind: str = "x0"
) -> Tensor:
    """Denoising error of the critic on the student's x0 over the free frames, a scalar (DMD2, section 4.2)."""
    x0 = x0.detach()  # the critic follows the student, not the reverse
    predicted = critic(add_noise(x0, eps, sigma), sigma, condition)
    error = free_mean((predicted - x0) ** 2, condition)
    return (critic_weight(sigma, kind) * error).mean()  # all kinds have the same minimum
