"""The first and last lines of a run."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from stage2_distill.config import DistillConfig
from stage2_distill.planning.machine import Machine
from stage2_distill.planning.memory import estimate_memory
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.planning.start_report import describe_output, start_lines
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here

GIB = 2**30
CONFIG = DistillConfig(("d",), "m", "run", compile=True, global_batch=4)
H200 = Machine(4, "NVIDIA H200", 139.8 * GIB, "flash-3")


def test_a_run_on_gpus(tmp_path: Path) -> None:
    """The figures measured on four H200s: 33.2 GiB, 6.84 s (benchmarks/results/modes-4x-*)."""
    lines = list(start_lines(CONFIG, TransformerSize(), H200, "compact", 500))
    assert len(lines) <= 8
    text = "\n".join(lines)
    assert "on 4 x NVIDIA H200: compact form, attention flash-3, activations selective, compiled" in text
    assert "about 33.3 of 139.8 GiB per GPU" in text
    assert "3500 iterations to do: about 6.68 s each, 6.5 h, 26.0 GPU-hours" in text
    assert "output: run, a checkpoint of 70.3 GB every 500 iterations, 3 kept; needs 281.2 GB" in text
    assert "the same command resumes" in text


@pytest.mark.parametrize(("warmup", "is_warned"), [(0, False), (5, False), (6, True), (200, True)])
def test_a_run_that_never_updates_the_student(warmup: int, is_warned: bool) -> None:
    config = replace(CONFIG, iterations=6, critic_warmup=warmup)  # the student's turns are 0, 5, 10, ...
    text = "\n".join(start_lines(config, TransformerSize(), H200, "compact", 0))
    assert ("WARNING: critic_warmup=" in text) == is_warned


def test_too_large_a_run_says_what_would_fit() -> None:
    small = Machine(1, "NVIDIA GeForce RTX 4090", 23.5 * GIB, "cudnn")
    lines = list(start_lines(replace(CONFIG, global_batch=1), TransformerSize(), small, "compact", 0))
    assert any(line.startswith("WARNING: this may be more memory") and "--lora-rank 32" in line for line in lines)
    assert any("scaled from H200 by data sheets, not measured" in line for line in lines)
    assert len(lines) <= 8


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = estimate_memory(CONFIG, TransformerSize(), world=1, form="compact")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": int(100e9)}))
    assert "100.0 GB free: TOO LITTLE" in describe_output(CONFIG, memory)


def test_a_whole_run_on_the_cpu(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shards, run = make_shards(tmp_path / "shards", model), tmp_path / "run"
    run_here(make_config(shards, model, run, iterations=2))
    first = caplog.messages
    assert first[0].startswith("on 1 x cpu: standard form, attention torch") and "per rank" in first[0]
    assert first[1].startswith("2 iterations to do; this device is not in the table of speeds")
    assert first[4].startswith(f"starting {run}") and first[-1].startswith("2 iterations in ")
    caplog.clear()
    run_here(make_config(shards, model, run, iterations=2))
    assert not [line for line in caplog.messages if " iterations in " in line]  # there was nothing to do
