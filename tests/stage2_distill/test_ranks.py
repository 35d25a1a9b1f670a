"""Gloo ranks against one process: the same global batch gives the same run."""

import json
from pathlib import Path

import pytest
import torch
from runs import make_config, make_shards, run_here, run_ranks, tensors

from stage2_distill.checkpoint import load, newest


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key.endswith(("loss", "grad_norm"))]


@pytest.mark.parametrize(("world", "batch_size"), [(2, 2), (2, 1), (4, 1)])
def test_ranks_equal_one_process(model: Path, shards: Path, tmp_path: Path, world: int, batch_size: int) -> None:
    options = {"iterations": 5, "checkpoint_every": 5, "student_lr": 1e-4, "critic_lr": 1e-4}
    alone = run_here(make_config(shards, model, tmp_path / "one", batch_size=4, **options))
    run = run_ranks(make_config(shards, model, tmp_path / "many", batch_size=batch_size, **options), world, tmp_path)
    assert losses(run) == pytest.approx(losses(alone.parent), rel=1e-5)
    expected = tensors(alone)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load(newest(run), found)
    for name, value in expected.items():
        if name.startswith(("student.", "critic.", "ema.")):
            off = (found[name] - value).norm() / value.norm()
            assert off < 1e-4, f"{name}: {off}"
