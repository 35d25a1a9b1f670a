"""Gloo ranks against one process: the same global batch gives the same run.

A large guidance and a large AdamW eps keep float32 rounding from being amplified: the random model hardly reads its
text, and a sign-like step would turn noise into a full step.
"""

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
    options = {
        "iterations": 5,
        "checkpoint_every": 5,
        "student_lr": 1e-2,
        "critic_lr": 1e-2,
        "eps": 1e-2,
        "grad_clip": 1.0,
    }
    alone = run_here(make_config(shards, model, tmp_path / "one", batch_size=4, **options))
    run = run_ranks(make_config(shards, model, tmp_path / "many", batch_size=batch_size, **options), world, tmp_path)
    assert losses(run) == pytest.approx(losses(alone.parent), rel=1e-6)
    expected = tensors(alone)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load(newest(run), found)
    for role in ("student.", "critic.", "ema."):
        names = [name for name in expected if name.startswith(role)]
        off = sum((found[name] - expected[name]).square().sum() for name in names)
        assert (off / sum(expected[name].square().sum() for name in names)).sqrt() < 1e-6, role
