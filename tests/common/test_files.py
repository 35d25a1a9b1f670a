"""Output folders: one owner at a time, also without file locks; what fails leaves them as they were."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import files
from common.files import (
    FolderLock,
    claim_link,
    process_identity,
    read_file,
    read_json,
    refuse_foreign_files,
    staged_output,
    write_file,
)
from common.model_folder import fingerprint_folder
from shards.storage.open import LocalStorage
from stage2_distill.monitoring.metrics_log import complete_lines
from stage2_distill.weight_files.lora_files import LoraFile, read_lora


@contextmanager
def child_process(work: Callable[[], None]) -> Iterator[int]:
    """Fork a process that calls `work` and then sleeps; yields its number, and kills it at the end."""
    ready, ready_to = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os.write(ready_to, b"x")
            time.sleep(60)
        finally:
            os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def lose_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    """Make the file system one without locks."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)


@pytest.fixture(params=["locks", "links"])
def lock_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "links":
        lose_locks(monkeypatch)
    return request.param


def test_a_permanent_lock_is_empty_once_nobody_holds_a_slot(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with child_process(lambda: FolderLock(tmp_path, "x.lock", permanent=True).hold(3)) as child:
        with FolderLock(tmp_path, "x.lock", permanent=True) as lock:
            lock.hold(1)
        assert f"process {child} on " in path.read_text()
    with FolderLock(tmp_path, "x.lock", permanent=True) as lock:
        lock.hold(1)
    assert path.read_bytes() == b""


def test_a_rank_that_fails_leaves_the_lock_file_to_the_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), FolderLock(tmp_path) as lock:
        lock.hold()
        lock.share()
        raise RuntimeError
    assert (tmp_path / "owner.lock").is_file()


def test_a_slot_has_one_owner_and_none_once_that_is_killed(lock_kind: str, tmp_path: Path) -> None:
    with (
        child_process(lambda: FolderLock(tmp_path, permanent=True).hold(2)) as child,
        FolderLock(tmp_path, permanent=True) as lock,
    ):
        lock.hold(1)
        with pytest.raises(ValueError, match=rf"^out={tmp_path}: process {child} on \S+ is working on it.*; wait"):
            lock.hold(2)
        assert not lock._try_slot(2)
    with FolderLock(tmp_path, permanent=True) as lock:  # nobody removed anything
        lock.hold(2)
    assert [path.name for path in tmp_path.iterdir()] == ["owner.lock"]


def test_a_killed_owner_that_nobody_has_waited_for_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_locks(monkeypatch)
    with child_process(lambda: FolderLock(tmp_path).hold()) as child, FolderLock(tmp_path) as lock:
        os.kill(child, signal.SIGKILL)
        while process_identity(child).split()[3] != "-":
            time.sleep(0.01)
        lock.hold()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_missing_locks_are_said_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lose_locks(monkeypatch, number)
    with FolderLock(tmp_path) as lock:
        for slot in range(3):
            lock.hold(slot)
        with lock.hold_briefly(3):
            assert len(list(tmp_path.glob("owner.lock.*"))) == 4
        assert len(list(tmp_path.glob("owner.lock.*"))) == 3
    assert [line.message for line in caplog.records] == [
        f"out={tmp_path}: has no file locks ({os.strerror(number)}); symbolic links stand for them"
    ]


def test_another_failure_of_a_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_locks(monkeypatch, errno.EIO)
    with FolderLock(tmp_path) as lock, pytest.raises(ValueError, match=rf"^out={tmp_path}: cannot be locked \(Input"):
        lock.hold()


def test_links_of_ended_processes_are_replaced_and_others_kept(tmp_path: Path) -> None:
    link, own = tmp_path / "owner.lock.0", process_identity(os.getpid())
    host, number, namespace, start, boot = own.split()
    assert int(start) > 0
    for ended in (f"{host} 4194305 {namespace} 5 {boot}", f"{host} {number} {namespace} 5 {boot}",
                  f"{host} {number} {namespace} {start} another-boot"):  # fmt: skip
        link.symlink_to(ended)
        assert claim_link(link) and str(link.readlink()) == own
        link.unlink()
    for unknown in (f"elsewhere {number} {namespace} 5 {boot}", f"{host} 4194305 pid:[1] 5 {boot}", own):
        link.symlink_to(unknown)
        assert not claim_link(link) and str(link.readlink()) == unknown
        link.unlink()
    assert not list(tmp_path.iterdir())


def test_a_brief_slot_is_waited_for(lock_kind: str, tmp_path: Path) -> None:
    def hold_a_while() -> None:
        lock = FolderLock(tmp_path)
        with lock.hold_briefly(0):
            os.write(ready_to, b"x")
            time.sleep(0.3)

    ready, ready_to = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        hold_a_while()
        os._exit(0)
    os.read(ready, 1)
    with FolderLock(tmp_path) as lock, lock.hold_briefly(0):
        assert time.perf_counter() - began > 0.3
    os.waitpid(child, 0)


def test_a_rank_that_outlives_the_first_keeps_the_folder(tmp_path: Path) -> None:
    def begin() -> None:
        lock = FolderLock(tmp_path)
        lock.hold()
        lock.share()

    with child_process(lambda: FolderLock(tmp_path).share()) as second:
        assert second
        with FolderLock(tmp_path) as lock, pytest.raises(ValueError, match="is working on it"):
            lock.hold()
    with child_process(begin), FolderLock(tmp_path) as lock:
        lock.share()  # the second rank
        with pytest.raises(ValueError, match="is working on it"):
            lock.hold()


def test_a_lock_beside_a_file_leaves_nothing(lock_kind: str, tmp_path: Path) -> None:
    with child_process(lambda: FolderLock(tmp_path, "v.lock").hold()):
        with FolderLock(tmp_path, "v.lock") as lock, pytest.raises(ValueError, match="is working"):
            lock.hold()
        assert (tmp_path / "v.lock").is_file()
    with FolderLock(tmp_path, "v.lock") as lock:
        lock.hold()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_was_deleted_meanwhile_is_not_held(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "v.lock") as late:
        (tmp_path / "v.lock").unlink()
        with pytest.raises(ValueError, match="repeat the command"):
            late.hold()


def test_staged_files_replace_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "old").touch()
    for _ in range(2):
        with pytest.raises(RuntimeError), staged_output(tmp_path) as staging:
            (staging / "a").write_text("new")
            raise RuntimeError
        assert (tmp_path / "a").read_text() == "old"
    with staged_output(tmp_path) as staging:
        assert not list(staging.iterdir())
        (staging / "a").write_text("new")
        (staging / "b.zarr").mkdir()
        (staging / "b.zarr" / "new").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "b.zarr", "b.zarr/new"]
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(RuntimeError), staged_output(tmp_path / "fresh"):
        raise RuntimeError
    assert not list((tmp_path / "fresh").iterdir())


def test_own_files_are_never_foreign(tmp_path: Path) -> None:
    FolderLock(tmp_path).close()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "owner.lock.0").symlink_to("x")
    refuse_foreign_files(tmp_path)
    (tmp_path / "letter").touch()
    with pytest.raises(ValueError, match="holds other files \\(letter\\)"):
        refuse_foreign_files(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_old_file_and_frees_the_space(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    """Also in place of files that nobody names: of a model, a data set, a checkpoint, a log."""
    for name in ("student.json", "metrics.jsonl", "config.json", "shard-000000.tar", "adapter_model.safetensors"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("{}")
    readers: list[Callable[[], object]] = [
        lambda: read_json(tmp_path / "student.json", dict[str, int]),
        lambda: complete_lines(tmp_path / "metrics.jsonl"),
        lambda: fingerprint_folder(tmp_path),
        lambda: LocalStorage(str(tmp_path)).read("shard-000000.tar", 0, 10),
        lambda: read_lora(LoraFile(tmp_path), {}),
        lambda: read_file(Path("/dev/zero")),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=": is a pipe or a device; copy its content into a file$"):
            read()
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)


def test_many_claims_have_one_winner(tmp_path: Path) -> None:
    """Twelve processes try to replace the same stale link at once."""
    host, _, namespace, _, boot = process_identity(os.getpid()).split()
    (tmp_path / "x.0").symlink_to(f"{host} 4194305 {namespace} 5 {boot}")
    code = f"import pathlib, time; from common.files import claim_link; print(claim_link(pathlib.Path({str(tmp_path / 'x.0')!r})), flush=True); time.sleep(3)"  # noqa: E501
    root = Path(files.__file__).parents[1]
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) for _ in range(12)]
    said = [process.communicate()[0].strip() for process in processes]
    assert said.count(b"True") == 1
