"""Executors: killed runs, ranks, shard ranges, the lock, a full disk, a CSV that changes during the run."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.files import FolderLock
from shards.manifest import read_manifest
from shards.verification.verify import verify_data_set
from stage1_encode.dataset_folder import FIRST_SHARD_SLOT, LOCK_FILE
from stage1_encode.encode import TooManyFailuresError, encode
from stage1_encode.executors import LocalExecutor
from tests import tiny_models
from tests.forked import run_python
from tests.stage1_encode.test_encode import configure, hashes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def complete_set(tmp_path_factory: pytest.TempPathFactory, clips: Path, model: Path) -> Path:
    """A data set of an uninterrupted run: three shards of two records."""
    out = tmp_path_factory.mktemp("whole") / "set"
    encode(configure(clips / "clips.csv", model, out, shard_size=2))
    return out


@pytest.mark.parametrize(("kills", "world"), [(30, 1), (6, 2)])
def test_kill_at_any_moment_and_the_bytes_are_the_same(
    kills: int, world: int, complete_set: Path, clips: Path, model: Path, tmp_path: Path
) -> None:
    worker = Path(__file__).with_name("kill_worker.py")
    completed = run_python(worker, model, clips / "clips.csv", tmp_path / "out", kills, world)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert int(completed.stdout) >= kills
    resumed = {name: digest for name, digest in hashes(tmp_path / "out").items() if not name.endswith(".partial")}
    assert resumed == hashes(complete_set)


def test_ranks_share_the_shards(clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    report = encode(configure(clips / "clips.csv", model, tmp_path / "out", shard_size=2))
    assert (report.shards, report.records, report.is_complete) == (1, 2, False)
    assert (tmp_path / "out/shard-000001.tar").exists() and not (tmp_path / "out/manifest.json").exists()


def test_a_job_array_makes_its_ranges(
    complete_set: Path, clips: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not encode(
        configure(clips / "clips.csv", model, tmp_path / "out", shard_size=2, shard_range="1:3")
    ).is_complete
    with pytest.raises(ValueError, match="is unfinished"):
        read_manifest(tmp_path / "out")
    assert encode(configure(clips / "clips.csv", model, tmp_path / "out", shard_size=2, shard_range="0:1")).is_complete
    assert hashes(tmp_path / "out") == hashes(complete_set)
    caplog.set_level(logging.INFO)
    beyond = encode(configure(clips / "clips.csv", model, tmp_path / "new", shard_size=2, shard_range="3:9"))
    assert (beyond.records, beyond.shards, beyond.is_complete) == (0, 0, False)
    assert "shard_range=3:9: the CSV gives shards 0:3 only; nothing to do" in caplog.messages
    with pytest.raises(ValueError, match="two whole numbers A:B"):
        configure(clips / "clips.csv", model, tmp_path / "out", shard_range="3:1")


def test_the_example_of_a_job_array_asks_for_ranges_that_meet(tmp_path: Path) -> None:
    stub = tmp_path / "ti2v-distill"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    ranges = []
    for job in range(3):
        path = f"{tmp_path}:{os.environ['PATH']}"
        command = ["bash", str(ROOT / "examples/slurm_encode.sh"), "my clips.csv", "MODEL", "DATA"]
        environment = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(job), "PER_JOB": "7"}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert output.startswith("encode --data my clips.csv --model MODEL --out DATA --shard-range ")
        ranges.append(configure(Path("a"), Path("b"), Path("c"), shard_range=output.split()[-2]).shard_bounds)
    assert ranges == [(0, 7), (7, 14), (14, 21)]


def test_a_second_run_waits_for_no_dead_process(clips: Path, model: Path, tmp_path: Path) -> None:
    ready, ready_to = os.pipe()
    child = os.fork()
    if not child:
        with FolderLock(tmp_path / "out", LOCK_FILE, permanent=True) as lock:
            lock.hold(FIRST_SHARD_SLOT + 1)
            os.write(ready_to, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    config = configure(clips / "clips.csv", model, tmp_path / "out", shard_size=2)
    with pytest.raises(ValueError, match=f"out=.*: process {child} on .* is working on it; wait for it to end"):
        encode(config)
    assert encode(configure(clips / "clips.csv", model, tmp_path / "out", shard_size=2, shard_range="0:1")).shards == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert encode(config).records == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("name", "is_kept"),
    [("shard-000001.tar", True), ("negative.safetensors", False), ("plan.json", False), ("manifest.json", True)],
)
def test_a_full_disk_is_one_line_and_leaves_whole_shards(
    name: str, is_kept: bool, complete_set: Path, clips: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{name}.partial").symlink_to("/dev/full")
    config = configure(clips / "clips.csv", model, out, shard_size=2)
    with pytest.raises(ValueError, match="^out=.*: No space left on device; fix this and rerun the same command$"):
        encode(config)
    first = out / "shard-000000.tar"
    assert first.is_file() == is_kept and not (out / "manifest.json").exists()
    before = first.stat().st_mtime_ns if is_kept else 0
    encode(config)
    assert hashes(out) == hashes(complete_set)
    assert not is_kept or first.stat().st_mtime_ns == before


@pytest.mark.parametrize("folder", ["/sys/ti2v", "/proc/ti2v", "FILE/set"])
def test_a_folder_that_cannot_be_written_is_one_line(folder: str, clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = Path(folder.replace("FILE", str(tmp_path / "file")))
    with pytest.raises(ValueError, match=rf"^out={out}: \w[^\n]*$"):
        encode(configure(clips / "clips.csv", model, out))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_line(clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="^out=.*: Permission denied$"):
        encode(configure(clips / "clips.csv", model, tmp_path / "out"))


def test_failed_rows_are_tried_again_when_asked(
    clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(clips / f"clip-{i}.mp4", f"prompt {i}") for i in range(5)]
    table = tiny_models.write_csv(tmp_path / "rows.csv", [*rows, (tmp_path / "late.mp4", "late")])
    config, retry = configure(table, model, tmp_path / "out"), {"retry_failures": True}
    with pytest.raises(
        TooManyFailuresError, match="5 records are in place; --retry-failures tries the failed rows again$"
    ):
        encode(config)
    shutil.copy(clips / "clip-5.mp4", tmp_path / "late.mp4")
    first_mtime = (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns
    with pytest.raises(TooManyFailuresError):
        encode(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^retry_failures=True: not under torchrun; "):
        encode(replace(config, **retry))
    monkeypatch.delenv("WORLD_SIZE")
    report = encode(replace(config, **retry))
    assert (report.records, report.failures, report.is_complete) == (6, 0, True)
    assert (tmp_path / "out/shard-000000.tar").stat().st_mtime_ns == first_mtime
    encode(configure(table, model, tmp_path / "whole", **retry))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert "retry_failures: false" in (tmp_path / "whole/encode.yaml").read_text()


@pytest.mark.parametrize("rows_after", [4, 2, None])
def test_csv_is_read_once(
    rows_after: int | None, clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows added or removed, or a CSV deleted, after the survey do not change the run."""
    rows = [(clips / f"clip-{i}.mp4", tiny_models.PROMPTS[i]) for i in range(6)]
    table = tiny_models.write_csv(tmp_path / "rows.csv", rows[:3])
    config = configure(table, model, tmp_path / "out", shard_size=2)
    load = LocalExecutor.load

    def change_csv(executor: LocalExecutor) -> None:
        table.unlink()
        if rows_after is not None:
            tiny_models.write_csv(table, rows[:rows_after])
        load(executor)

    def fail_to_sleep(seconds: float) -> None:
        raise AssertionError("waits for itself")

    monkeypatch.setattr(LocalExecutor, "load", change_csv)
    monkeypatch.setattr("stage1_encode.encode.time", SimpleNamespace(sleep=fail_to_sleep, monotonic=time.monotonic))
    assert encode(config).records == 3
    monkeypatch.setattr(LocalExecutor, "load", load)
    if rows_after == 4:
        assert encode(config).records == 4
    else:
        message = "No such file or directory" if rows_after is None else "lines 4 to 4 changed|fewer rows"
        with pytest.raises(ValueError, match=f"^data=.*: .*({message})"):
            encode(config)
    assert verify_data_set(tmp_path / "out").problems == ()


def test_an_engine_that_is_not_installed_is_named(
    clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine=ray: Ray is not installed; pip install 'ti2v-distill\[ray\]'"):
        encode(configure(clips / "clips.csv", model, tmp_path / "out", engine="ray"))
