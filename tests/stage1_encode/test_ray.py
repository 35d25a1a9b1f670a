"""A Ray cluster on this machine: after its worker is killed, the bytes equal those of an uninterrupted run."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.writer import shard_file_name
from stage1_encode.encode import encode
from tests.stage1_encode.test_encode import configure, hashes

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def workers() -> list[int]:
    """Processes that run a `LocalExecutor` of this cluster, without their forks, which have the same name."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes()
            parent = path.with_name("stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if name.startswith(b"ray::LocalExecutor"):
            parents[int(path.parent.name)] = int(parent)
    return [process for process, parent in parents.items() if parent not in parents]


def test_a_killed_worker_costs_nothing(clips: Path, model: Path, tmp_path: Path) -> None:
    encode(configure(clips / "clips.csv", model, tmp_path / "whole", shard_size=1))
    killed: list[int] = []

    def kill() -> None:
        while not (tmp_path / "out" / shard_file_name(0)).is_file():
            time.sleep(0.01)
        for process in workers():
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = encode(configure(clips / "clips.csv", model, tmp_path / "out", shard_size=1, engine="ray"))
    killer.join()
    assert len(killed) == 1
    assert report.is_complete and report.records == 6
    assert {name: sha for name, sha in hashes(tmp_path / "out").items() if not name.endswith(".partial")} == hashes(
        tmp_path / "whole"
    )


def test_one_worker_a_gpu(clips: Path, model: Path, tmp_path: Path) -> None:
    """Ray is told that there are two GPUs; the workers see none and compute on the CPU."""
    encode(configure(clips / "clips.csv", model, tmp_path / "whole", shard_size=1))
    seen: set[int] = set()
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            seen.update(workers())

    watcher = threading.Thread(target=watch, daemon=True)
    before = set(workers())
    watcher.start()
    encode(configure(clips / "clips.csv", model, tmp_path / "out", shard_size=1, engine="ray", device="auto"))
    finished.set()
    watcher.join()
    assert len(seen - before) == 2
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_relative_paths_are_those_of_the_command(
    clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").symlink_to(clips)
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)  # the workers stay where the cluster was started
    assert encode(configure(Path("clips/clips.csv"), Path("model"), Path("out"), engine="ray")).records == 6


def test_a_model_that_does_not_load_is_one_line(clips: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    next((tmp_path / "model" / "vae").glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^model=.*/vae: cannot be read: [^\n]*$"):
        encode(configure(clips / "clips.csv", tmp_path / "model", tmp_path / "out", engine="ray"))
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_mistake_in_a_worker_is_one_line(clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / (shard_file_name(1) + ".partial")).mkdir()  # a shard that cannot be written
    with pytest.raises(ValueError, match=r"^out=.*: Is a directory; fix this and rerun the same command$"):
        encode(configure(clips / "clips.csv", model, tmp_path / "out", engine="ray"))
