"""The two losses of Distribution Matching Distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

They know networks only as `Denoiser`s. Shapes: B batch, C channels, T latent frames, H W latent size.
"""

import torch
from torch import Tensor

from common.condition import Condition, Denoiser, free
from common.flow import add_noise, per_sample


def dmd_gradient(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> Tensor:
    """Direction (free frames of B C T H W) from the teacher's law to the student's, normalised a sample.

    (fake - real) / mean|x0 - real| at x_t = add_noise(x0, eps, sigma) (DMD eq. 7 and 8). No gradient flows.
    """
    with torch.no_grad():
        x_t = add_noise(x0, eps, sigma)
        fake = free(critic(x_t, sigma, condition), condition)
        real = free(teacher(x_t, sigma, condition), condition)
        weight = (free(x0, condition) - real).abs().mean(dim=(1, 2, 3, 4))
        return (fake - real) / per_sample(weight)


def dmd_loss(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> Tensor:
    """Scalar whose derivative by the free frames of x0 is `dmd_gradient` / numel (DMD2, section 3)."""
    gradient = dmd_gradient(x0, condition, teacher=teacher, critic=critic, sigma=sigma, eps=eps)
    student = free(x0, condition)
    target = (student - gradient).detach()
    return 0.5 * torch.nn.functional.mse_loss(student, target)


def critic_weight(sigma: Tensor, kind: str) -> Tensor:
    """Weight (B) of the squared x0 error: 1 (`x0`), 1/sigma^2 (`flow`), ((1-sigma)/sigma)^2 (`noise`)."""
    if kind == "flow":
        return sigma**-2
    return ((1 - sigma) / sigma) ** 2 if kind == "noise" else torch.ones_like(sigma)


def critic_loss(
    x0: Tensor, condition: Condition, *, critic: Denoiser, sigma: Tensor, eps: Tensor, kind: str = "x0"
) -> Tensor:
    """Denoising error of the critic on the student's x0 over the free frames, a scalar (DMD2 section 4.2)."""
    x0 = x0.detach()
    predicted = critic(add_noise(x0, eps, sigma), sigma, condition)
    error = (free(predicted, condition) - free(x0, condition)) ** 2
    return (per_sample(critic_weight(sigma, kind)) * error).mean()
