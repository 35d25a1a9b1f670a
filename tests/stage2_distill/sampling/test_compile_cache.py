"""Compiled code outlives its process: a second one finds it, and a folder that cannot be written is named."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stage2_distill.sampling.compile_cache import VARIABLE, keep_compiled_code

ROOT = Path(__file__).parents[3]
PROGRAM = """
import logging
import torch
from torch._dynamo.utils import counters
from stage2_distill.sampling.compile_cache import keep_compiled_code
logging.basicConfig(level=logging.INFO, format="%(message)s")
keep_compiled_code()
torch.compile(lambda x: x.sin() * 2, dynamic=False)(torch.ones(8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_a_second_process_finds_the_code_of_the_first(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}
    results = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append((done.stdout.strip(), done.stderr))
    folder = tmp_path / "ti2v-distill-compiled"
    assert [found for found, _ in results] == ["0 1", "1 0"]
    assert f"compiled code: kept in {folder}, empty yet" in results[0][1]
    assert f"compiled code: kept in {folder}, used again" in results[1][1]
    assert folder.stat().st_mode & 0o77 == 0  # nobody else may put code there


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv(VARIABLE, str(file / "below"))
    with pytest.raises(ValueError, match=f"{VARIABLE}=.*/below: cannot be written .*; name another folder"):
        keep_compiled_code()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with caplog.at_level(logging.WARNING):
        keep_compiled_code()  # torch's own folder does
    assert "stays in torch's temporary folder" in caplog.text
    assert VARIABLE not in os.environ
