"""The reference implementation's losses and gradients, reproduced (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from common.condition import Condition, Denoiser, pin
from common.flow import add_noise, per_sample, shift, timestep_sigmas
from stage2_distill.dmd.losses import critic_loss, dmd_loss

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "turbo_float32.json").read_text())
TOY = GOLDEN["toy"]
LADDER = timestep_sigmas((1000, 750, 500, 250), s=5.0)
CASES = [(exit_at, n) for exit_at in range(2) for n in (3, 100, 500, 950)]


def det(shape: tuple[int, ...], k: int) -> Tensor:
    """The closed form of draw k, in the reference's layout."""
    count = torch.Size(shape).numel()
    values = 1.2 * torch.sin(0.7311 * torch.arange(count, dtype=torch.float64) + 1.3 * k)
    return values.to(torch.float32).reshape(shape)


def draw(k: int) -> Tensor:
    """Draw k as a video (B C T H W)."""
    return rearrange(det((1, 31, 4, 4, 4), k), "b t c h w -> b c t h w")


def table(s: float) -> Tensor:
    """The reference's table of 1000 sigmas."""
    return torch.tensor([shift(1 - i / 1000, s) for i in range(1000)])


def nearest(t: float, s: float) -> Tensor:
    """Sigma of the table's entry nearest to t."""
    sigmas = table(s)
    return sigmas[(sigmas * 1000 - t).abs().argmin()]


def toy(coeffs: Tensor, conversion_shift: float, t: float | None = None) -> Denoiser:
    """The toy network as a denoiser, with the reference's whole-number tokens and its conversion table.

    t: the time that the network is told, where the noise was added with the table's nearest entry to it.
    """

    def denoise(x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        a, b, c = coeffs
        x_t = pin(x_t, condition)
        time = 1000 * sigma.item() if t is None else t
        tokens = torch.full((1, 1, 31, 1, 1), float(int(time)))
        tokens[:, :, 0] = 0
        flow = a * x_t + b * tokens / 1000 + c * condition.text.mean()
        return pin(x_t - nearest(time, conversion_shift) * flow, condition)

    return denoise


def guided_by_six(plain: Denoiser, negative: Tensor) -> Denoiser:
    def denoise(x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        cond = plain(x_t, sigma, condition)
        return cond + 6 * (cond - plain(x_t, sigma, Condition(condition.first_frame, negative)))

    return denoise


class Scenario:
    def __init__(self, exit_at: int, n: int) -> None:
        self.coeffs = {name: torch.tensor(values, requires_grad=True) for name, values in TOY["coeffs"].items()}
        frame = rearrange(det((1, 1, 4, 4, 4), 103), "b t c h w -> b c t h w")
        self.condition = Condition(frame, det((1, 8, 16), 101))
        self.negative = 0.5 * det((1, 8, 16), 102)
        student = toy(self.coeffs["generator"], 5.0)
        x_t = draw(1)
        for step in range(exit_at):  # draws 2.. are the fresh noise between steps
            x0 = student(x_t, torch.tensor([LADDER[step]]), self.condition).detach()
            x_t = add_noise(x0, draw(2 + step), torch.tensor([LADDER[step + 1]]))
        self.x0 = student(x_t, torch.tensor([LADDER[exit_at]]), self.condition)
        self.eps = draw(2 + exit_at)
        self.t = 1000 * min(max(shift(n / 1000, 5.0), 0.02), 0.98)
        self.sigma = nearest(self.t, 5.0).reshape(1)
        self.teacher = guided_by_six(toy(self.coeffs["real"], 8.0, self.t), self.negative)
        self.critic = toy(self.coeffs["fake"], 8.0, self.t)


@pytest.mark.parametrize(("exit_at", "n"), CASES)
def test_student_loss_and_gradient(exit_at: int, n: int) -> None:
    golden = GOLDEN["dmd"][f"generator_fp32_exit{exit_at}_t{n}"]
    s = Scenario(exit_at, n)
    loss = dmd_loss(s.x0, s.condition, teacher=s.teacher, critic=s.critic, sigma=s.sigma, eps=s.eps)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"] * 30 / 31, rel=1e-5)
    assert s.coeffs["generator"].grad.tolist() == pytest.approx(golden["generator_param_grad"], rel=1e-4)
    assert s.coeffs["real"].grad is None
    assert s.coeffs["fake"].grad is None


@pytest.mark.parametrize(("exit_at", "n"), CASES)
def test_critic_loss_and_gradient(exit_at: int, n: int) -> None:
    golden = GOLDEN["dmd"][f"critic_x0_fp32_exit{exit_at}_t{n}"]
    s = Scenario(exit_at, n)
    loss = critic_loss(s.x0, s.condition, critic=s.critic, sigma=s.sigma, eps=s.eps)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"] * 31 / 30, rel=1e-5)
    expected = [value * 31 / 30 for value in golden["fake_param_grad"]]
    assert s.coeffs["fake"].grad.tolist() == pytest.approx(expected, rel=1e-4)
    assert s.coeffs["generator"].grad is None


def test_ladder_is_the_reference_step_list() -> None:
    expected = [float.fromhex(value) for value in GOLDEN["warped_step_list"]["shift5_hex"]]
    assert [1000 * sigma for sigma in LADDER] == pytest.approx(expected, rel=1e-7)


def test_per_sample_keeps_the_batch_first() -> None:
    assert per_sample(torch.arange(3.0)).shape == (3, 1, 1, 1, 1)
