"""AdamW without a first moment against torch's, and which of the two a run takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.schedule import STUDENT
from stage2_distill.optim.adamw import CHUNK_PARAMETERS, PlainAdamW
from stage2_distill.optim.optimizers import OptimizerSettings
from tests.stage2_distill.training_helpers import make_config

SETTINGS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}


def layers() -> nn.ModuleList:
    """More parameters than are updated by one call."""
    made = nn.ModuleList(nn.Linear(7, 5) for _ in range(CHUNK_PARAMETERS))
    for number, parameter in enumerate(made.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(number))
    return made


def test_100_steps_have_the_bits_of_torchs() -> None:
    mine, theirs = layers(), layers()
    plain = PlainAdamW(mine, SETTINGS | {"beta2": 0.999})
    torchs = torch.optim.AdamW(theirs.parameters(), betas=(0.0, 0.999), foreach=False, **SETTINGS)
    for step in range(100):
        for optimizer in (plain, torchs):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step % 3)
        for number, (one, two) in enumerate(zip(mine.parameters(), theirs.parameters(), strict=True)):
            draws = torch.Generator().manual_seed(1000 * step + number)
            without = step == 3 and number == 2  # it has one step less from then on
            one.grad = None if without else 10.0 ** (number % 5 - 3) * torch.randn(one.shape, generator=draws)
            two.grad = None if one.grad is None else one.grad.clone()
        plain.step()
        torchs.step()
    for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(plain.state[one]["exp_avg_sq"], torchs.state[two]["exp_avg_sq"])


@pytest.mark.parametrize(("beta1", "slots"), [(0.0, {"step", "exp_avg_sq"}), (0.9, {"step", "exp_avg_sq", "exp_avg"})])
def test_a_first_moment_is_kept_only_where_there_is_one(
    model: Path, tmp_path: Path, beta1: float, slots: set[str]
) -> None:
    net = layers()
    config = make_config(tmp_path, model, tmp_path, beta1=beta1)
    settings = OptimizerSettings.of(config, start_process_group("cpu"), "standard")
    optimizer = settings.build_optimizer(net, STUDENT)
    assert {slot for parameter in net.parameters() for slot in optimizer.state[parameter]} == slots
