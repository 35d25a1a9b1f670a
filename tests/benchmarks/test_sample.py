"""The benchmark of sampling runs at tiny size, on the CPU, and its equalities hold."""

from pathlib import Path

from tests.forked import run_python

PROGRAM = """
import sys
from pathlib import Path
from benchmarks.runner import run_benchmark
from benchmarks.sample import PARTS, SampleBenchmark
bench = SampleBenchmark(Path(sys.argv[1]), True, 1, 2)
run_benchmark("sample", (row for part in PARTS.values() for row in part(bench)), keep=False)
"""


def test_tiny_benchmark(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_python(tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert figures["same seed, same latents; frame 0 pinned"] == "True; True"
    assert float(figures["latents against the plain path, relative L2"]) < 1e-4
    assert all(figures[f"--vram {mode}"].endswith("same latents True") for mode in ("16gb", "12gb"))
    assert "of one at a time" in figures["2 rows on 1 x cpu"]
    assert float(figures["diffusers, decode"].split()[-2]) > 50
    assert figures["tiny decoder, decode"].endswith(" s")
    assert (tmp_path / "2" / "000000001.mp4").is_file()
