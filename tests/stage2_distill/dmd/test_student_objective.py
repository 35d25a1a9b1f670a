"""What options make of the student's loss, on laws whose denoisers are known."""

import pytest
import torch

from common.flow import timestep_sigmas
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.regression import TeacherRegression
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.dmd.score_noise import ScoreNoise
from stage2_distill.dmd.student_objective import StudentObjective
from tests.stage2_distill.dmd.gaussian import TEXT_ONLY, Gaussian

TEACHER = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([[1.2, 0.0], [0.5, 0.6]]))
STUDENT = Gaussian(torch.tensor([0.2, 0.3]), torch.tensor([[0.7, 0.0], [-0.4, 1.5]]))
SAMPLES = tuple(range(8))


def objective(**changes: object) -> StudentObjective:
    """The objective of a run with these options, without guidance."""
    config = DistillConfig(shards=("d",), model="m", out="o", **changes)
    return config.select(
        StudentObjective,
        teacher=TEACHER.denoise,
        fake=STUDENT.denoise,
        score_noise=config.select(ScoreNoise),
        regression=config.select(TeacherRegression),
        sigmas=timestep_sigmas(config.timesteps, s=config.shift),
    )


def samples(exit_index: int) -> tuple[Simulated, MicroBatch]:
    """The student's samples of one micro-batch, and that micro-batch."""
    draws = torch.Generator().manual_seed(exit_index)
    x_t, x0 = (STUDENT.sample(len(SAMPLES), draws) for _ in range(2))
    part = MicroBatch(3, "student", SAMPLES, SAMPLES, 1.0, last=True, spec=DistillConfig(("d",), "m", "o").spec, step=0)
    return Simulated(x0.requires_grad_(), TEXT_ONLY, exit_index, x_t), part


def gradient(loss: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, x0)
    return found


@pytest.mark.parametrize("exit_index", range(4))
def test_exit_weights_scale_the_gradient_and_not_the_report(exit_index: int) -> None:
    weights = (0.25, 1.0, 2.0, 0.0)
    given = samples(exit_index)
    plain, reported = objective().matching_loss(*given)
    weighted, same = objective(exit_weights=weights).matching_loss(*given)
    assert plain is reported and torch.equal(plain, same)
    expected = weights[exit_index] * gradient(plain, given[0].x0)
    torch.testing.assert_close(gradient(weighted, given[0].x0), expected)


def test_exit_weights_are_one_for_each_timestep() -> None:
    with pytest.raises(ValueError, match=r"^exit_weights=1,0\.5: give 4 numbers, one for each timestep$"):
        objective(exit_weights=(1.0, 0.5))


def test_the_regression_is_not_reported() -> None:
    """`critic_teacher_gap` is computed from what is reported."""
    given = samples(1)
    total, reported = objective(regression_weight=2.0, regression_steps=2).matching_loss(*given)
    plain, _ = objective().matching_loss(*given)
    assert torch.equal(reported, plain) and total > plain
