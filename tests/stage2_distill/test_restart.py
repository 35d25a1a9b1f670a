"""`kill -9` of one rank under torchrun: all are started again and go on from the newest checkpoint."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from common.options import write_config
from stage2_distill.checkpointing.format import list_checkpoints
from stage2_distill.distributed.process_group import restart_store
from tests.stage2_distill.training_helpers import ROOT, make_config, make_shards, run_here

OPTIONS = {
    "iterations": 6,
    "checkpoint_every": 2,
    "async_checkpoint": False,
    "keep_last": 9,
    "global_batch": 4,
    "student_lr": 1e-2,
    "critic_lr": 1e-2,
    "eps": 1e-2,
    "activation_checkpointing": "off",
}


def losses(run: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(6))
    return {(line["iteration"], key): line[key] for line in lines for key in line if key.endswith("loss")}


def test_a_killed_rank(model: Path, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "data", model)
    run_here(make_config(shards, model, tmp_path / "alone", batch_size=4, **OPTIONS))
    write_config(tmp_path / "c.yaml", make_config(shards, model, tmp_path / "run", batch_size=2, **OPTIONS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "benchmarks.witness", str(tmp_path / "c.yaml"), "--die", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "killed").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000002", "step-000004", "step-000006"]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    lines = [line.split() for n in (0, 1) for line in (tmp_path / "run" / f"seen-{n}.txt").read_text().splitlines()]
    times = Counter((int(iteration), int(sample)) for iteration, role, sample, _ in lines if role == "critic")
    assert {n: {times[n, sample] for sample in range(4)} for n in range(5)} == {0: {1}, 1: {1}, 2: {1}, 3: {1}, 4: {2}}
    assert len({tuple(line) for line in lines}) == 4 * (6 + 3), "the same samples the second time"


def test_each_start_has_a_part_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert not restart_store(store).check(["address"])
        restart_store(store).set("address", count)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert restart_store(store) is store, "restarts are counted by node"
