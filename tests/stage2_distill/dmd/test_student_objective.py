"""What options make of the student's loss, on laws whose denoisers are known."""

from dataclasses import replace

import pytest
import torch

from common.condition import Condition
from common.flow import add_noise, timestep_sigmas
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.losses import dmd_loss
from stage2_distill.dmd.regression import FirstStepAnchor, TeacherRegression
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.dmd.score_noise import ScoreNoise
from stage2_distill.dmd.student_objective import StudentObjective
from tests.stage2_distill.dmd.gaussian import TEXT_ONLY, Gaussian, points, videos

TEACHER = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([[1.2, 0.0], [0.5, 0.6]]))
STUDENT = Gaussian(torch.tensor([0.2, 0.3]), torch.tensor([[0.7, 0.0], [-0.4, 1.5]]))
UNCONDITIONAL = Gaussian(torch.tensor([0.0, 1.0]), torch.tensor([[1.6, 0.0], [0.2, 1.9]]))
SAMPLES = tuple(range(8))


def objective(**changes: object) -> StudentObjective:
    """The objective of a run with these options, without guidance."""
    config = DistillConfig(shards=("d",), model="m", out="o", **changes)
    return config.select(
        StudentObjective,
        teacher=TEACHER.denoise,
        matched_teacher=TEACHER.denoise,
        guidance=guided if config.decoupled_guidance else None,
        fake=STUDENT.denoise,
        score_noise=config.select(ScoreNoise),
        regression=config.select(TeacherRegression),
        anchor=config.select(FirstStepAnchor),
    )


def guided(x_t: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher with a guidance of 3 against a law without a prompt, and without guidance."""
    cond, uncond = TEACHER.denoise(x_t, sigma, condition), UNCONDITIONAL.denoise(x_t, sigma, condition)
    return uncond + 3 * (cond - uncond), cond


def samples(exit_index: int) -> tuple[Simulated, MicroBatch]:
    """The student's samples of one micro-batch, and that micro-batch."""
    draws = torch.Generator().manual_seed(exit_index)
    x_t, x0 = (STUDENT.sample(len(SAMPLES), draws) for _ in range(2))
    part = MicroBatch(3, "student", SAMPLES, SAMPLES, 1.0, last=True, spec=DistillConfig(("d",), "m", "o").spec, step=0)
    return Simulated(x0.requires_grad_(), TEXT_ONLY, exit_index, x_t), part


def gradient(loss: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, x0)
    return found


def test_without_options_it_is_the_loss_of_dmd() -> None:
    """Which the golden numbers hold."""
    simulated, part = samples(1)
    sigma, eps = objective().score_noise.draw(part, simulated)
    networks = {"teacher": TEACHER.denoise, "critic": STUDENT.denoise}
    expected = dmd_loss(simulated.x0, TEXT_ONLY, **networks, sigma=sigma, eps=eps)
    total, reported = objective().matching_loss(simulated, part)
    assert torch.equal(total, expected) and torch.equal(reported, expected)
    assert torch.equal(gradient(total, simulated.x0), gradient(expected, simulated.x0))


@pytest.mark.parametrize("exit_index", range(4))
def test_exit_weights_scale_the_gradient_and_not_the_report(exit_index: int) -> None:
    weights = (0.25, 1.0, 2.0, 0.0)
    given = samples(exit_index)
    plain, reported = objective().matching_loss(*given)
    weighted, same = objective(exit_weights=weights).matching_loss(*given)
    assert plain is reported and torch.equal(plain, same)
    expected = weights[exit_index] * gradient(plain, given[0].x0)
    torch.testing.assert_close(gradient(weighted, given[0].x0), expected)


def test_the_temporal_term_is_added_with_its_weight_and_not_reported() -> None:
    """Points of the plane have one frame and no variance over time, so none of them is below the teacher's."""
    given = samples(2)
    total, reported = objective(temporal_variance_weight=0.05).matching_loss(*given)
    assert torch.equal(total, reported)
    x0 = given[0].x0.detach().repeat(1, 1, 3, 1, 1) * torch.tensor([1.0, 1.1, 0.9])[:, None, None]
    moving = Simulated(x0.requires_grad_(), TEXT_ONLY, 2)
    teacher = {"matched_teacher": lambda x_t, sigma, condition: 3 * x_t, "fake": lambda x_t, sigma, condition: x_t}
    total, reported = replace(objective(temporal_variance_weight=0.05), **teacher).matching_loss(moving, given[1])
    variance = x0.var(dim=2, correction=0).mean(dim=(1, 2, 3))
    assert (total - reported).item() == pytest.approx(0.05 * -(variance + 1e-6).log().mean().item(), rel=1e-4)


def test_exit_weights_are_one_for_each_timestep() -> None:
    with pytest.raises(ValueError, match=r"^exit_weights=1,0\.5: give 4 numbers, one for each timestep$"):
        objective(exit_weights=(1.0, 0.5))


@pytest.mark.parametrize("exit_index", range(4))
def test_decoupled_guidance_is_a_difference_of_scores_at_its_own_noise(exit_index: int) -> None:
    """What it adds is -2 sigma^2 / (1 - sigma) grad log(p_cond / p_uncond), normalised, from the exit's sigma on."""
    (simulated, part), followed = samples(exit_index), objective(decoupled_guidance=True)
    sigma, eps = followed.score_noise.draw_guidance(part, simulated)
    assert not torch.equal(sigma, followed.score_noise.draw(part, simulated)[0])
    exit_sigma = timestep_sigmas((1000, 750, 500, 250), s=5.0)[exit_index]
    assert sigma.min() >= min(0.98, exit_sigma - 1e-6) and sigma.max() <= 0.98
    x_t = points(add_noise(simulated.x0, eps, sigma)).detach().requires_grad_()
    log_ratio = TEACHER.noisy(sigma).log_prob(x_t) - UNCONDITIONAL.noisy(sigma).log_prob(x_t)
    (score_difference,) = torch.autograd.grad(log_ratio.sum(), x_t)
    end, _ = guided(videos(x_t.detach()), sigma, TEXT_ONLY)
    scale = (simulated.x0 - end).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    added = -2 * videos(score_difference * (sigma**2 / (1 - sigma))[:, None]) / scale
    plain, total = objective().matching_loss(simulated, part)[0], followed.matching_loss(simulated, part)[0]
    found = (gradient(total, simulated.x0) - gradient(plain, simulated.x0)) * simulated.x0.numel()
    torch.testing.assert_close(found, added.detach(), rtol=1e-3, atol=1e-4)


def test_no_guidance_cannot_be_decoupled() -> None:
    with pytest.raises(ValueError, match="^decoupled_guidance=True: needs a guidance_scale other than 1"):
        objective(decoupled_guidance=True, guidance_scale=1.0)


def test_the_anchor_acts_on_the_first_step_alone() -> None:
    for exit_index in range(4):
        terms = objective(anchor_weight=0.5)
        total, reported = terms.matching_loss(*samples(exit_index))
        assert bool(total > reported) is (exit_index == 0)
        torch.testing.assert_close(total - reported, 0.5 * terms.anchor.distance(samples(exit_index)[0], terms.teacher))


def test_the_regression_is_not_reported() -> None:
    """`critic_teacher_gap` is computed from what is reported."""
    given = samples(1)
    total, reported = objective(regression_weight=2.0, regression_steps=2).matching_loss(*given)
    plain, _ = objective().matching_loss(*given)
    assert torch.equal(reported, plain) and total > plain
