"""Gloo ranks against one process: the same global batch gives the same run.

A large guidance and a large AdamW eps keep float32 rounding from being amplified: the random model hardly reads its
text, and a sign-like step would turn noise into a full step.
"""

import json
from pathlib import Path

import pytest
import torch
from runs import make_config, make_shards, run_here, run_worker, tensors

from stage2_distill.checkpoint import load, newest

OPTIONS = {
    "iterations": 10,
    "checkpoint_every": 10,
    "student_every": 3,
    "ladder": (1000.0, 500.0),
    "global_batch": 16,
    "student_lr": 1e-2,
    "critic_lr": 1e-2,
    "eps": 1e-2,
    "grad_clip": 1.0,
}
CASES = {  # ranks: (name, batch size, replicas)
    1: (("accumulated", 4, 1),),
    2: (("plain", 8, 1), ("accumulated", 2, 1)),
    4: (("plain", 4, 1), ("accumulated", 1, 1), ("hsdp", 4, 2), ("hsdp-accumulated", 1, 2)),
}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def alone(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that never accumulates."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return run_here(make_config(shards, model, out, batch_size=16, **OPTIONS)).parent


@pytest.fixture(scope="module", params=CASES)
def runs(request, model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs of all cases of one number of ranks, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    configs = [
        make_config(shards, model, folder / name, batch_size=size, replicate=replicate, **OPTIONS)
        for name, size, replicate in CASES[request.param]
    ]
    if request.param == 1:
        return [run_here(config).parent for config in configs]
    return run_worker(configs, request.param, folder)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key.endswith(("loss", "grad_norm"))]


def test_losses_and_weights_equal_one_process(alone: Path, runs: list[Path]) -> None:
    expected = tensors(newest(alone))
    for run in runs:
        assert losses(run) == pytest.approx(losses(alone), rel=1e-6), run.name
        found = {name: torch.zeros_like(value) for name, value in expected.items()}
        load(newest(run), found)
        for role in ("student.", "critic.", "ema."):
            names = [name for name in expected if name.startswith(role)]
            off = sum((found[name] - expected[name]).square().sum() for name in names)
            assert off.sqrt() / sum(expected[name].square().sum() for name in names).sqrt() < 1e-6, (run.name, role)
