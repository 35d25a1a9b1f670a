"""Regression onto the end of the teacher's path: its sigmas, its fixed point, and a whole run with it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.condition import Condition
from common.flow import shift
from stage2_distill.dmd.regression import FirstStepAnchor, TeacherRegression
from stage2_distill.dmd.rollout import Simulated, sample_euler, solve_flow
from tests.stage2_distill.dmd.gaussian import TEXT_ONLY, Gaussian
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here, tensors

TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)
TEACHER = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([[1.2, 0.0], [0.5, 0.6]]))
FORMS = {
    "standard": {},
    "compact": {"dtype": "bfloat16", "optimizer_form": "compact", "student_lr": 1e-4, "critic_lr": 1e-4},
    "lora": {"lora_rank": 2, "student_lr": 1e-2, "critic_lr": 1e-2},
}


def test_the_path_begins_at_the_exit_and_is_uniform_before_the_shift() -> None:
    regression = TeacherRegression(1.0, 4, TIMESTEPS, 5.0)
    for index, timestep in enumerate(TIMESTEPS):
        expected = [shift(timestep / 1000 * part, 5.0) for part in (1.0, 0.75, 0.5, 0.25)]
        assert regression.path(index) == pytest.approx(expected)


def test_the_target_of_a_gaussian_teacher_is_its_flow_and_carries_the_whole_gradient() -> None:
    """The flow of N(m, S) maps x at sigma to m + S^1/2 ((1 - sigma)^2 S + sigma^2)^-1/2 (x - (1 - sigma) m)."""
    x_t = torch.randn(64, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x0 = torch.zeros_like(x_t, requires_grad=True)
    regression = TeacherRegression(1.0, 400, TIMESTEPS, 5.0)
    loss = 3 * regression.distance(Simulated(x0, TEXT_ONLY, 2, x_t), TEACHER.denoise)
    loss.backward()
    sigma, (values, vectors) = shift(0.5, 5.0), torch.linalg.eigh(TEACHER.covariance)
    gain = vectors @ torch.diag((values / ((1 - sigma) ** 2 * values + sigma**2)).sqrt()) @ vectors.T
    end = TEACHER.mean + (x_t[:, :, 0, 0, 0] - (1 - sigma) * TEACHER.mean) @ gain
    torch.testing.assert_close(-x0.grad[:, :, 0, 0, 0] * x0.numel() / 6, end, rtol=0.02, atol=0.02)
    assert loss.item() == pytest.approx(3 * end.square().mean().item(), rel=0.03)


def test_the_error_of_the_path_falls_with_the_square_of_its_steps() -> None:
    x_t = torch.randn(64, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def end(steps: int, solve: Callable[..., torch.Tensor] = solve_flow) -> torch.Tensor:
        sigmas = TeacherRegression(1.0, steps, TIMESTEPS, 5.0).path(2)
        return solve(TEACHER.denoise, x_t, TEXT_ONLY, sigmas=sigmas)

    exact = end(2000)
    errors = [(end(steps) - exact).norm().item() for steps in (20, 40, 80)]
    assert [one / other for one, other in pairwise(errors)] == pytest.approx([4, 4], rel=0.2)
    assert (end(40, sample_euler) - exact).norm().item() > 2 * errors[0]  # Euler's is larger with twice the steps


def test_a_path_of_one_step_ends_at_the_teachers_mean() -> None:
    x_t = torch.randn(8, 2, 1, 1, 1, generator=torch.Generator().manual_seed(4))
    mean = TEACHER.denoise(x_t, x_t.new_full((8,), shift(0.75, 5.0)), TEXT_ONLY)
    samples = Simulated(mean + 0.5, TEXT_ONLY, 1, x_t)
    distance = TeacherRegression(1.0, 1, TIMESTEPS, 5.0).distance(samples, TEACHER.denoise)
    assert distance.item() == pytest.approx(0.25, rel=1e-5)


def test_a_given_first_frame_counts_nowhere() -> None:
    frame = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    x_t = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    x0 = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    x0[:, :, 0] = 1e6
    x0.requires_grad_()
    samples = Simulated(x0, Condition(frame, torch.zeros(2, 1, 1)), 1, x_t)
    TeacherRegression(1.0, 2, TIMESTEPS, 5.0).distance(samples, lambda x, s, c: 0.5 * x).backward()
    assert x0.grad[:, :, 0].abs().max() == 0
    assert x0.grad[:, :, 1:].abs().min() > 0


@pytest.mark.parametrize("steps", [1, 5, 24])
def test_the_anchors_target_is_the_chord_of_the_teachers_path(steps: int) -> None:
    """For a teacher of one video c the path is straight, so that the first step should predict c."""
    noise, video = (torch.randn(4, 2, 1, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x0 = torch.zeros_like(noise, requires_grad=True)
    anchor = FirstStepAnchor(0.5, steps, 5.0)
    distance = anchor.distance(Simulated(x0, TEXT_ONLY, 0, noise), lambda x_t, sigma, condition: video)
    distance.backward()
    assert distance.item() == pytest.approx(video.square().mean().item(), rel=1e-3)
    torch.testing.assert_close(x0.grad, -2 * video / x0.numel(), rtol=1e-3, atol=1e-4)
    assert anchor.path()[0] == 1 and anchor.path()[-1] == pytest.approx(shift(1 - steps / 24, 5.0))
    other = anchor.distance(Simulated(x0, TEXT_ONLY, 1, noise), lambda x_t, sigma, condition: video)
    assert other.item() == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_to_the_bit_and_differs_from_matching_alone(form: str, model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model)
    common = FORMS[form] | {
        "iterations": 3, "checkpoint_every": 1, "student_update_interval": 1, "timesteps": (1000.0, 500.0),
        "max_text_tokens": 16, "regression_steps": 2,
    }  # fmt: skip
    options = common | {"regression_weight": 4.0}
    whole = tensors(run_here(make_config(shards, model, tmp_path / "whole", **options)))
    run_here(make_config(shards, model, tmp_path / "half", **options | {"iterations": 2}))
    again = tensors(run_here(make_config(shards, model, tmp_path / "half", **options)))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    plain = tensors(run_here(make_config(shards, model, tmp_path / "plain", **common)))
    assert any(not torch.equal(value, plain[name]) for name, value in whole.items() if name.startswith("student."))
