"""Students of the nano world are judged by their names, in every precision, beside the controls."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import judge_students
from benchmarks.ablate_nano import MODEL


def test_files_are_judged_in_every_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {}
    for part in (MODEL / "transformer").glob("*.safetensors"):
        weights |= load_file(part)
    save_file(weights, tmp_path / "copy-2.safetensors")
    options = ["--tiny", "--controls", "--precision", "float32", "fp8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["judge_students", str(tmp_path / "copy-2.safetensors"), *options])
    judge_students.main()
    table, lines = (next(tmp_path.glob(f"*.{kind}")).read_text() for kind in ("md", "jsonl"))
    rows = {row["variant"]: row for row in map(json.loads, lines.splitlines())}
    assert rows["copy"]["seed"] == rows["copy, fp8"]["seed"] == 2
    exact, rounded, same = (rows[name]["measures"]["floors"] for name in ("copy", "copy, fp8", "undistilled, 4 steps"))
    assert exact == pytest.approx(same, rel=1e-4)  # a copy of the teacher is the undistilled student
    assert rounded != exact
    assert "\n| copy, fp8 | 1 | " in table


def test_a_broken_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    monkeypatch.setattr(sys, "argv", ["judge_students", str(tmp_path / "bad.safetensors"), "--tiny"])
    with pytest.raises(SystemExit, match="2"):
        judge_students.main()
    assert "bad.safetensors: cannot be read" in capsys.readouterr().err.splitlines()[-1]
