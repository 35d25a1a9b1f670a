"""Interrupted runs: stopped by a signal, killed, resumed, without disk space, with a damaged checkpoint."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.options import write_config
from stage2_distill import train, trainer
from stage2_distill.checkpointing.format import (
    INDEX_FILE,
    STUDENT_FILE,
    checkpoint_damage,
    list_checkpoints,
    read_facts,
)
from stage2_distill.checkpointing.writer import SaveError
from stage2_distill.distributed import signals
from tests.forked import run_python
from tests.stage2_distill.training_helpers import ROOT, assert_same, flip, make_config, make_shards, run_here

TIME_METRICS = {"seconds", "memory_gib"}
OPTIONS = {
    "iterations": 8,
    "checkpoint_every": 2,
    "batch_size": 2,
    "global_batch": 2,
    "timesteps": (1000.0, 500.0),
    "activation_checkpointing": "off",
}


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data", model)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_here(make_config(shards, model, tmp_path_factory.mktemp("uninterrupted") / "run", **OPTIONS))


def lines(run: Path) -> list[dict[str, float]]:
    """The metrics of a run except those that depend on time and memory."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_METRICS and not k.startswith("seconds_")} for line in read]


@pytest.fixture
def before_iteration(monkeypatch: pytest.MonkeyPatch):
    """Call functions before iterations: `before_iteration({3: function})`."""

    def arrange(actions) -> None:
        step = trainer.train_step

        def wrapper(trainer, iteration, data):
            actions.get(iteration, lambda: None)()
            return step(trainer, iteration, data)

        monkeypatch.setattr(train, "train_step", wrapper)

    return arrange


def wait_for_writer() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_saves_and_the_same_command_resumes(
    model: Path,
    shards: Path,
    uninterrupted: Path,
    tmp_path: Path,
    before_iteration,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("started with nohup, which is respected")
    caplog.set_level(logging.INFO)
    config = make_config(shards, model, tmp_path / "run", **OPTIONS)
    before_iteration({4: lambda: os.kill(os.getpid(), number)})
    assert run_here(config).name == "step-000005"  # the iteration is finished, not abandoned
    assert "stopped after iteration 5; resume with the same command" in caplog.text
    before_iteration({})
    assert_same(uninterrupted, run_here(config))
    assert lines(tmp_path / "run") == lines(uninterrupted.parent)


def test_second_signal_ends_at_once_unless_it_is_the_first_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, before = [100.0], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with signals.StopSignal() as stop:
            assert not stop.is_requested()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # torchrun forwards a signal that all ranks have received
            assert stop.is_requested()
            monkeypatch.setattr(signals.signal, "SIG_DFL", signal.default_int_handler)
            now[0] += 6
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_command_exits_with_0(model: Path, shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", make_config(shards, model, tmp_path / "run", **OPTIONS | {"iterations": 100_000}))
    command = [sys.executable, "cli.py", "distill", "--config", str(tmp_path / "c.yaml")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None and not (tmp_path / "run" / "step-000002").is_dir():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "resume with the same command" in stderr


def test_killed_20_times_nothing_is_lost(model: Path, shards: Path, uninterrupted: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", make_config(shards, model, tmp_path / "run", **OPTIONS))
    process = run_python("tests/stage2_distill/kill_worker.py", tmp_path / "c.yaml", 20)
    assert process.returncode == 0, process.stderr[-3000:]
    killed, inside = map(int, process.stdout.split())
    assert killed == 20
    assert inside >= 5
    assert_same(uninterrupted, list_checkpoints(tmp_path / "run")[-1])
    assert lines(tmp_path / "run") == lines(uninterrupted.parent)
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*"))] == [
        "step-000004", "step-000006", "step-000008"
    ]  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = [
    ("*.safetensors", flip, "other bytes than were written"),
    ("*.safetensors", truncate, "bytes, .* were written"),
    ("*.safetensors", Path.unlink, "is missing"),
    (STUDENT_FILE, flip, "other bytes than were written"),
    (INDEX_FILE, truncate, "is damaged or from another program"),
    (INDEX_FILE, Path.unlink, "cannot be read"),
]


@pytest.mark.parametrize(("pattern", "damage", "message"), DAMAGES)
def test_damage_is_detected_and_named(uninterrupted: Path, tmp_path: Path, pattern: str, damage, message: str) -> None:
    copy = shutil.copytree(uninterrupted, tmp_path / uninterrupted.name)
    assert checkpoint_damage(copy) is None
    path = next(copy.glob(pattern))
    damage(path)
    problem = checkpoint_damage(copy)
    assert problem is not None
    assert problem.startswith((path.name, str(path)))
    assert re.search(message, problem)


def test_checkpoint_before_a_damaged_one_is_used(
    model: Path, shards: Path, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(uninterrupted.parent, tmp_path / "run")
    config = make_config(shards, model, tmp_path / "run", **OPTIONS | {"keep_last": 1})
    file = next((tmp_path / "run" / "step-000008").glob("*.safetensors"))
    flip(file)
    assert_same(uninterrupted, run_here(config))
    assert f"step-000008 is damaged: {file.name} has other bytes" in caplog.text
    assert "resuming from step-000006 instead" in caplog.text
    assert lines(tmp_path / "run") == lines(uninterrupted.parent)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-000008", "step-000008.damaged"]
    flip(next((tmp_path / "run" / "step-000008").glob("*.safetensors")))
    with pytest.raises(ValueError, match="all checkpoints are damaged"):
        run_here(config)


def test_full_disk_keeps_older_checkpoints_and_training_continues(
    model: Path, shards: Path, uninterrupted: Path, tmp_path: Path, before_iteration, caplog: pytest.LogCaptureFixture
) -> None:
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(soft: int) -> None:
        wait_for_writer()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, old_limit[1]))

    before_iteration({2: lambda: limit(50_000), 4: lambda: limit(old_limit[0])})
    try:
        last = run_here(make_config(shards, model, tmp_path / "run", **OPTIONS | {"keep_last": 2}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert "checkpoint step-000004 could not be written" in caplog.text
    assert "File too large" in caplog.text
    assert_same(uninterrupted, last)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000006", "step-000008"]
    assert not list((tmp_path / "run").glob("*.partial"))


def test_failed_last_checkpoint_raises_and_prunes_nothing(
    model: Path, shards: Path, tmp_path: Path, before_iteration
) -> None:
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        wait_for_writer()
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))

    before_iteration({3: limit})
    config = make_config(shards, model, tmp_path / "run", **OPTIONS | {"iterations": 4, "keep_last": 1})
    try:
        with pytest.raises(SaveError, match="step-000004 could not be written .* repeat the same command"):
            run_here(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    before_iteration({})
    assert run_here(config).name == "step-000004"


def test_checkpoint_has_its_stream_position_and_the_pause_is_measured(uninterrupted: Path) -> None:
    facts = read_facts(uninterrupted)
    assert (facts.iteration, facts.position) == (8, 2 * (8 + 4))  # 8 critic and 4 student updates of 2 records
    assert facts.config["student_update_interval"] == 2
    read = [json.loads(line) for line in (uninterrupted.parent / "metrics.jsonl").read_text().splitlines()]
    assert ["seconds_checkpoint" in line for line in read] == [False, False, True, False, True, False, True, False]
