"""The law of the score times."""

import math

import pytest
import torch

from common.condition import Condition
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.rollout import Simulated
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.dmd.score_noise import ScoreNoise, low_score_sigmas


def sigmas(role: str, **changes: float) -> torch.Tensor:
    """Sigma of 4000 samples of one update."""
    config = DistillConfig(shards=("d",), model="m", out="o", **changes)
    samples = tuple(range(4000))
    simulated = Simulated(torch.zeros(4000, 1, 1, 1, 1), Condition(None, torch.zeros(4000, 1, 1)), 0)
    part = MicroBatch(3, role, samples, samples, 1.0, last=True, spec=config.spec, step=0)
    return config.select(ScoreNoise).draw(part, simulated)[0]


def test_low_sigmas_are_uniform_in_the_logarithm() -> None:
    drawn = low_score_sigmas(torch.arange(1000) / 1000)
    assert drawn[0].item() == pytest.approx(0.01)
    assert drawn[500].item() == pytest.approx(math.sqrt(0.01 * 0.5))
    assert drawn.max() < 0.5


@pytest.mark.parametrize(("role", "option"), [("student", "score_time_low_share"), ("critic", "critic_time_low_share")])
def test_the_density_is_that_of_the_mixture(role: str, option: str) -> None:
    """P(sigma <= x) is 0.7 of the shifted law's + 0.3 ln(x / 0.01) / ln 50 up to 0.5; other draws do not change."""
    share, plain = 0.3, sigmas(role)
    drawn = sigmas(role, **{option: share})
    for x in (0.02, 0.05, 0.2, 0.5, 0.8):
        low = math.log(min(x, 0.5) / 0.01) / math.log(50)
        expected = (1 - share) * x / (5 - 4 * x) + share * low  # u of sigma at shift 5
        assert (drawn <= x).float().mean().item() == pytest.approx(expected, abs=0.025)
    same = (drawn == plain).float().mean().item()
    assert same == pytest.approx(1 - share, abs=0.025)
    other = "critic" if role == "student" else "student"
    assert torch.equal(sigmas(other, **{option: share}), sigmas(other))
