"""How the first rank ends the others: by a message, or not at all if they may be in the middle of something."""

from types import SimpleNamespace

import pytest
import torch

from common.condition import Condition
from stage2_distill.sampling import multi_gpu
from stage2_distill.sampling.multi_gpu import HEADER_SIZE, LeaderSampler


def make_student() -> SimpleNamespace:
    """A student whose latents are zeros."""
    condition = Condition(None, torch.zeros(1, 2, 4))
    return SimpleNamespace(
        device=torch.device("cpu"),
        build_condition=lambda records: condition,
        sample_latents=lambda *_: torch.zeros(1, 48, 1, 2, 2),
    )


@pytest.mark.parametrize(
    ("samples", "fails", "ends"),
    [(1, False, True), (0, True, True), (1, True, False)],
    ids=["done", "refused before anything was sampled", "failed, perhaps during a decode"],
)
def test_end_of_the_other_ranks(monkeypatch: pytest.MonkeyPatch, samples: int, fails: bool, ends: bool) -> None:
    sent: list[list[int]] = []
    ended: list[bool] = []
    monkeypatch.setattr(multi_gpu.dist, "broadcast", lambda tensor, source: sent.append(tensor.flatten().tolist()))
    monkeypatch.setattr(multi_gpu.dist, "destroy_process_group", lambda: ended.append(True))
    try:
        with LeaderSampler(make_student()) as sampler:
            for _ in range(samples):
                sampler([], [5])
            if fails:
                raise OSError("no space left")
    except OSError:
        pass
    assert (sent[-1] == [0] * HEADER_SIZE) is ends
    assert bool(ended) is ends
    if samples:
        assert sent[0] == [1, 0, 2, 0, 1, 0, 0]  # one video, segment 0, two rows of float32 text, no frame
        assert sent[1] == [5]
