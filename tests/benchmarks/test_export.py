"""The benchmark of exports runs at tiny size, on the CPU."""

from pathlib import Path

from tests.forked import run_python


def test_tiny_benchmark(tmp_path: Path) -> None:
    done = run_python("-m", "benchmarks.export", "--tiny", "--folder", tmp_path / "files")
    assert done.returncode == 0, done.stderr[-2000:]
    figures = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert [name.split(",")[0] for name in figures] == [
        "checkpoint's average", "diffusers", "wan", "wan", "lora of rank 32 by SVD"
    ]  # fmt: skip
    assert all("peak host memory" in text for name, text in figures.items() if name != "checkpoint's average")
    assert (tmp_path / "files" / "run" / "step-000001" / "student.json").is_file()
