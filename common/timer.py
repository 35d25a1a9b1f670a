"""Seconds per phase of an iteration, measured without waiting for the GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class PhaseTimer:
    """Sums the seconds of each phase. On a GPU, events measure when the work runs, not when it is submitted."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.sums: dict[str, float] = {}
        self.pending_events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start_time, first = time.perf_counter(), self._record_event()
        yield
        last = self._record_event()
        if first is not None and last is not None:
            self.pending_events.append((phase, first, last))
        else:
            self._add_seconds(phase, time.perf_counter() - start_time)

    def time_items(self, items: Iterator[Item], phase: str) -> Iterator[Item]:
        """Yield `items` and add the time of waiting for each, on the CPU, to a phase."""
        start_time = time.perf_counter()
        for item in items:
            self._add_seconds(phase, time.perf_counter() - start_time)
            yield item
            start_time = time.perf_counter()

    def read_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call; work that is still running is part of the next."""
        while self.pending_events and self.pending_events[0][2].query():  # complete; never waits
            phase, first, last = self.pending_events.pop(0)
            self._add_seconds(phase, first.elapsed_time(last) / 1000)
        sums, self.sums = self.sums, {}
        return sums

    def _record_event(self) -> torch.Event | None:
        if not self.on_gpu:
            return None
        event = torch.Event("cuda", enable_timing=True)  # without timing, elapsed_time fails
        event.record()
        return event

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.sums[phase] = self.sums.get(phase, 0.0) + seconds
