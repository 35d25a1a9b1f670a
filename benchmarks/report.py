"""Printing figures and keeping them: one file a benchmark, hardware and day."""

import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """The machine in a file name's words: its GPU, or its number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"{len(os.sched_getaffinity(0))}-cpu-cores"


def peak(*, reset: bool = False) -> float:
    """Highest resident memory since the last reset, in MB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def append(name: str, rows: Iterable[tuple[str, str]], *, model: str = "none") -> Path:
    """Print rows of (what, figure) and add them to this day's file."""
    path = RESULTS / f"{name}-{hardware()}-{time.strftime('%Y-%m-%d')}.md"
    path.parent.mkdir(exist_ok=True)
    command = shlex.join(["python", *sys.orig_argv[1:]])
    lines = [f"`{command}`, model: {model}, torch {torch.__version__}, {time.strftime('%H:%M')}", ""]
    lines += ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows), "", ""]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines))
    print("\n".join(lines))
    return path
