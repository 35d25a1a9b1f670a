"""What all benchmarks share: the command line, timing, facts of the device, and the files of results."""

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

Row = tuple[str, str]  # what was measured, and its value with unit
GPU = torch.cuda.is_available()
RESULTS = Path(__file__).parent / "results"
RANDOM_WEIGHTS = "random weights of the true size"


def parse_arguments(description: str | None, **options: object) -> argparse.Namespace:
    """Parse the command line: a flag for each keyword, with its value as the default.

    The type of a flag is that of its default. A default of False makes a switch; a class means no default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(flag, type=default)
        else:
            parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    return parser.parse_args()


def run_benchmark(
    name: str, rows: Iterable[Row], *, keep: bool = True, rank: int = 0, model: str = "none", layout: str = "{}: {}"
) -> None:
    """Print each row as soon as it is measured and, if `keep`, append all of them to the results.

    All ranks measure; only rank 0 prints and appends. A ValueError of a measurement ends the program with one line.
    """
    measured = []
    try:
        for row in rows:
            measured.append(row)
            if rank == 0:
                print(layout.format(*row), flush=True)
    except ValueError as error:  # a file or an option of the user, as in cli.py
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if keep and rank == 0:
        append_results(name, measured, model=model)


def append_results(
    name: str,
    rows: Iterable[Sequence[str]],
    *,
    model: str,
    columns: Sequence[str] = ("what", "figure"),
    folder: Path = RESULTS,
) -> None:
    """Print a table of the rows and append it to the file of this benchmark, hardware and day."""
    path = results_path(name, "md", folder)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    lines = [f"`{command}`, model: {model}, torch {torch.__version__}, {time.strftime('%H:%M')}", ""]
    lines += [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join([*lines, "", ""]))
    print("\n".join(lines))


def results_path(name: str, suffix: str, folder: Path = RESULTS) -> Path:
    """Return the file of this benchmark, hardware and day."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{hardware_name()}-{time.strftime('%Y-%m-%d')}.{suffix}"


def hardware_name() -> str:
    """Return the machine as part of a file name: its GPU, or its number of CPU cores."""
    if GPU:
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"{len(os.sched_getaffinity(0))}-cpu-cores"


def sync() -> float:
    """Wait for the GPU and return the time in seconds."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def call_times(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, with the GPU's work included."""
    seconds = []
    for _ in range(repeats):
        began = sync()
        work()
        seconds.append(sync() - began)
    return seconds


def time_call(
    work: Callable[[], object],
    *,
    warm: int = 1,
    repeats: int = 3,
    choose: Callable[[Sequence[float]], float] = statistics.median,
) -> float:
    """Return the median (or other choice) of the seconds of `repeats` calls after `warm` calls."""
    for _ in range(warm):
        work()
    return choose(call_times(work, repeats))


def peak_gib() -> float:
    """Return the GPU memory allocated at most since the previous call, in GiB; 0 without a GPU."""
    if not GPU:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def peak_text() -> str:
    """Return `peak_gib` as text."""
    return f"peak {peak_gib():.1f} GiB" if GPU else "no GPU"


def resident_peak_mb(*, reset: bool = False) -> float:
    """Return the highest resident memory of this process since the last reset, in MB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
