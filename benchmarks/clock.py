"""Seconds and memory of work on a GPU, or on the CPU."""

import time
from collections.abc import Callable

import torch

GPU = torch.cuda.is_available()


def sync() -> float:
    """The time, once the GPU has done its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def times(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat."""
    found = []
    for _ in range(repeats):
        began = sync()
        work()
        found.append(sync() - began)
    return found


def peak() -> float:
    """Most GiB allocated since the last call."""
    if not GPU:
        return 0.0
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most
