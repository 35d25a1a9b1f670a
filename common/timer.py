"""Seconds per phase of an iteration, measured without waiting for the GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class PhaseTimer:
    """Seconds by phase. On a GPU events measure them where the work is done; `read` gives what has ended by then."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.sums: dict[str, float] = {}
        self.pending_events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside towards a phase."""
        start_time, first = time.perf_counter(), self._record_event()
        yield
        last = self._record_event()
        if first is not None and last is not None:
            self.pending_events.append((phase, first, last))
        else:
            self._add_seconds(phase, time.perf_counter() - start_time)

    def time_items(self, items: Iterator[Item], phase: str) -> Iterator[Item]:
        """Yield `items` and count the wait for each, on the host."""
        while True:
            start_time = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._add_seconds(phase, time.perf_counter() - start_time)
            yield item

    def read_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reading; work that still runs is counted in the next."""
        running = []
        for phase, first, last in self.pending_events:
            if last.query():
                self._add_seconds(phase, first.elapsed_time(last) / 1000)
            else:
                running.append((phase, first, last))
        sums, self.sums, self.pending_events = self.sums, {}, running
        return sums

    def _record_event(self) -> torch.Event | None:
        if not self.on_gpu:
            return None
        event = torch.Event("cuda", enable_timing=True)
        event.record()
        return event

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.sums[phase] = self.sums.get(phase, 0.0) + seconds
