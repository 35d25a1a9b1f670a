"""The losses against closed forms."""

import pytest
import torch

from common.condition import Condition
from common.flow import add_noise, score_sigma
from stage2_distill.dmd.losses import critic_loss, critic_weight, dmd_loss, temporal_variance_loss
from tests.stage2_distill.dmd.gaussian import TEXT_ONLY, Gaussian, points, videos

TEACHER = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([[1.2, 0.0], [0.5, 0.6]]))
STUDENT = Gaussian(torch.tensor([0.2, 0.3]), torch.tensor([[0.7, 0.0], [-0.4, 1.5]]))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_dmd_gradient_is_the_difference_of_scores() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9, 0.98])
    x0 = STUDENT.sample(4, draws()).requires_grad_()
    eps = torch.randn(x0.shape, generator=draws(1))
    loss = dmd_loss(x0, TEXT_ONLY, teacher=TEACHER.denoise, critic=STUDENT.denoise, sigma=sigma, eps=eps)
    loss.backward()
    x_t = points(add_noise(x0, eps, sigma)).detach().requires_grad_()
    log_ratio = STUDENT.noisy(sigma).log_prob(x_t) - TEACHER.noisy(sigma).log_prob(x_t)
    (score_difference,) = torch.autograd.grad(log_ratio.sum(), x_t)
    # x0_hat = (x_t + sigma^2 score) / (1 - sigma), Tweedie
    difference = videos(score_difference * (sigma**2 / (1 - sigma))[:, None])
    real = TEACHER.denoise(add_noise(x0, eps, sigma), sigma, TEXT_ONLY)
    expected = difference / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True) / x0.numel()
    torch.testing.assert_close(x0.grad, expected.detach(), rtol=1e-5, atol=1e-5)


def test_dmd_gradient_is_zero_when_the_laws_agree() -> None:
    x0 = TEACHER.sample(8, draws()).requires_grad_()
    eps = torch.randn(x0.shape, generator=draws(1))
    sigma = torch.linspace(0.02, 0.98, 8)
    dmd_loss(x0, TEXT_ONLY, teacher=TEACHER.denoise, critic=TEACHER.denoise, sigma=sigma, eps=eps).backward()
    assert x0.grad.abs().max() == 0


def test_toy_student_reaches_the_teachers_law() -> None:
    """300 iterations of both losses, a linear student and a Gaussian critic, from far away."""
    student = Gaussian(torch.zeros(2, requires_grad=True), torch.eye(2).mul(0.3).requires_grad_())
    critic = Gaussian(torch.zeros(2, requires_grad=True), torch.eye(2).mul(0.3).requires_grad_())
    optimizers = [
        torch.optim.Adam([law.mean, law.factor], lr=lr, betas=(0.0, 0.9))
        for law, lr in ((student, 0.08), (critic, 0.16))
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300) for optimizer in optimizers]
    random = draws()
    for _ in range(300):
        for turn, optimizer in enumerate(optimizers):
            x0 = student.sample(1024, random)
            eps = torch.randn(x0.shape, generator=random)
            sigma = score_sigma(torch.rand(1024, generator=random), s=5.0)
            fake = critic.denoise
            if turn == 0:
                loss = dmd_loss(x0, TEXT_ONLY, teacher=TEACHER.denoise, critic=fake, sigma=sigma, eps=eps)
            else:
                loss = critic_loss(x0, TEXT_ONLY, critic=fake, sigma=sigma, eps=eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    off_mean = (student.mean - TEACHER.mean).norm() / TEACHER.mean.norm()
    off_covariance = (student.covariance - TEACHER.covariance).norm() / TEACHER.covariance.norm()
    assert off_mean < 0.05
    assert off_covariance < 0.05


def test_the_temporal_term_acts_below_the_teachers_variance_alone() -> None:
    """Its gradient is -2 (x0 - mean over time) / (v elements): each frame moves away from the mean."""
    x0 = torch.randn(3, 2, 5, 4, 4, generator=draws(7)).requires_grad_()
    # the teacher's predictions have 4 times, 0.81 times and no variance over time
    real = torch.stack([2 * x0[0].detach(), 0.9 * x0[1].detach(), torch.zeros(2, 5, 4, 4)])
    for cutoff, acts in ((1.0, (True, False, False)), (1.3, (True, True, False)), (0.2, (False, False, False))):
        loss = temporal_variance_loss(x0, real, cutoff=cutoff)
        (found,) = torch.autograd.grad(loss, x0)
        centred = (x0 - x0.mean(dim=2, keepdim=True)).detach()
        variance = centred.square().mean(dim=(1, 2, 3, 4))
        logs = torch.where(torch.tensor(acts), -variance.log(), 0)
        assert loss.item() == pytest.approx(logs.sum().item() / 3, rel=1e-4, abs=1e-6)
        scale = torch.where(torch.tensor(acts), -2 / (variance * x0.numel()), 0)
        torch.testing.assert_close(found, scale[:, None, None, None, None] * centred, rtol=1e-4, atol=1e-8)


def test_critic_loss_is_least_for_the_true_denoiser() -> None:
    x0, sigma = STUDENT.sample(4096, draws()), torch.full((4096,), 0.7)
    eps = torch.randn(x0.shape, generator=draws(1))
    true, wrong = (
        critic_loss(x0, TEXT_ONLY, critic=law.denoise, sigma=sigma, eps=eps).item() for law in (STUDENT, TEACHER)
    )
    covariance = STUDENT.covariance
    gain = 0.3**2 * covariance @ torch.linalg.inv(0.3**2 * covariance + 0.7**2 * torch.eye(2))
    assert true == pytest.approx((covariance - gain @ covariance).trace().item() / 2, rel=0.05)
    assert wrong > 1.5 * true


def test_frame_zero_counts_nowhere() -> None:
    """Garbage in the given frame of x0 changes neither loss nor gradient, and gets no gradient."""
    frame = torch.randn(2, 3, 1, 2, 2, generator=draws(2))
    condition = Condition(frame, torch.zeros(2, 1, 1))
    x0 = torch.randn(2, 3, 4, 2, 2, generator=draws(3))
    other = x0.clone()
    other[:, :, 0] = 1e6
    eps, sigma = torch.randn(x0.shape, generator=draws(4)), torch.tensor([0.3, 0.9])

    def half(x_t: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return 0.5 * x_t

    def third(x_t: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        return x_t / 3

    results = []
    for x in (x0, other):
        leaf = x.clone().requires_grad_()
        loss = dmd_loss(leaf, condition, teacher=third, critic=half, sigma=sigma, eps=eps)
        loss.backward()
        assert leaf.grad[:, :, 0].abs().max() == 0
        critic = critic_loss(x, condition, critic=half, sigma=sigma, eps=eps)
        results.append((loss.item(), leaf.grad[:, :, 1:], critic.item()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize(("kind", "weight"), [("x0", 1.0), ("flow", 1 / 0.64), ("noise", 0.0625)])
def test_critic_weights(kind: str, weight: float) -> None:
    assert critic_weight(torch.tensor([0.8]), kind).item() == pytest.approx(weight)
