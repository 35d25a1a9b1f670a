"""Seconds from the start of a process to its first finished video with compiled blocks, twice, in an empty cache.

    python -m benchmarks.first_video [--tiny] [--folder FOLDER]

Random weights at the true size, made on the GPU: what reading 23 GB of weights takes comes on top. The first process
compiles, the second finds the code of the first. --tiny is a small model on the CPU. --folder: of the compiled code, if
not an empty one, such as to compare a disk with a network folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch._dynamo.utils import counters

from benchmarks.modes import process_age
from benchmarks.runner import Row, call_times, parse_arguments, run_benchmark
from benchmarks.sample import SampleBenchmark
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.sampling.compile_cache import VARIABLE

CHILD = "TI2V_FIRST_VIDEO_CHILD"  # set in the measured processes


def measure_process(small: bool) -> Iterator[Row]:
    """Make two videos in this process, and say when the first was finished."""
    yield "imports after", f"{process_age():.1f} s"
    with tempfile.TemporaryDirectory() as folder:
        bench = SampleBenchmark(Path(folder), small, 1, 1)
        for block in bench.student.net.blocks:
            block.plan = ExecutionPlan(compiled=True)
        yield "models after", f"{process_age():.1f} s"
        first = call_times(lambda: bench.generate(1), 1)[0]
        age = process_age()
        second = call_times(lambda: bench.generate(1), 1)[0]
    yield "first video", f"{first:.1f} s, {first - second:.1f} s more than the second"
    found, made = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
    yield "graphs found in the cache, compiled", f"{found}, {made}"
    yield "first video after the start of the process", f"{age:.1f} s"


def measure(options: argparse.Namespace, folder: str) -> Iterator[Row]:
    """Run two processes one after the other."""
    command = [sys.executable, "-m", "benchmarks.first_video", *(["--tiny"] if options.tiny else [])]
    for name in ("first", "second"):
        environment = os.environ | {VARIABLE: folder, CHILD: "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            what, _, figure = line.partition(": ")
            yield f"{name} process, {what}", figure


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, folder=str)
    if CHILD in os.environ:
        run_benchmark("first_video", measure_process(options.tiny), keep=False)
        return
    with tempfile.TemporaryDirectory() as empty:
        rows = measure(options, options.folder or empty)
        run_benchmark("first_video", rows, keep=not options.tiny, model="random weights")


if __name__ == "__main__":
    main()
