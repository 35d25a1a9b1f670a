"""Reader pool: a decoder that crashes or hangs costs one file, and no child outlives the run."""

import time
from pathlib import Path

import pytest

from common.video import VideoSpec
from stage1_encode.media.reader_pool import ReaderPool
from tests import tiny_models

SPEC = VideoSpec(9, 64, 96)
FAKE_DECORD = """
import ctypes, os, signal, time

class DECORDError(Exception):
    pass

class logging:
    QUIET = 0
    set_level = staticmethod(lambda level: None)

def VideoReader(path, num_threads):
    path = os.path.basename(path)
    if "segfault" in path:
        ctypes.string_at(0)
    if "hang" in path:
        ctypes.PyDLL(None).sleep(1000)  # within C, no Python runs
    if "greedy" in path:
        raise MemoryError
    if "exit" in path:
        os._exit(3)
    raise DECORDError("not this one")
"""


def test_a_crashing_or_hanging_decoder_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/decord.py").write_text(FAKE_DECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    names = ["good", "segfault", "hang", "exit", "greedy", "good-after"]
    for name in names:
        path = tiny_models.make_clip(tmp_path / f"{name}.mp4", seed=0)
        if "good" not in name:  # decord is asked only for codecs that PyAV does not know
            path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    pool = ReaderPool(1, SPEC, 2.0)
    start = time.monotonic()
    results = [pool.submit(str(tmp_path / f"{name}.mp4")) for name in names]
    reasons = [str(future.exception()) for future in results]
    pool.close()
    assert time.monotonic() - start < 30
    assert results[0].exception() is None and results[5].exception() is None
    assert reasons[1] == "crashes the decoder (SIGSEGV)"
    assert reasons[2] == "took longer than 2 s"
    assert reasons[3] == "crashes the decoder (exit code 3)"
    assert "GiB of memory" in reasons[4]


def test_a_child_ends_with_its_parent_gone() -> None:
    pool = ReaderPool(1, SPEC, 20.0)
    child = pool.idle_processes.get()
    child._wait_until_ready()
    child.connection.close()  # what the system does when the parent is killed
    assert child.process.wait(10) == 0
    pool.threads.shutdown()
