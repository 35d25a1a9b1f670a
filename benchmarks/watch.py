"""When the parts of a video end, by events in the GPU's own queue, so that watching delays nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median
from typing import TypeAlias

import torch
from torch import nn

from benchmarks.runner import GPU, sync

Mark: TypeAlias = float | torch.cuda.Event


@dataclass(frozen=True)
class Parts:
    """Seconds of one video, and of its parts, which add up to it."""

    whole: float
    before: float  # text, first frame, and opening of files
    denoising: float
    decode: float
    after: float  # from the last decoded frame to the finished file


def median_parts(videos: Sequence[Parts]) -> Parts:
    """Return the median of each part."""
    return Parts(*(median(values) for values in zip(*map(astuple, videos), strict=True)))


def record_mark() -> Mark:
    """Record this position in the GPU's queue, or the time without a GPU."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Return the seconds between two marks."""
    if isinstance(first, torch.cuda.Event):
        return first.elapsed_time(second) / 1e3
    assert isinstance(second, float)
    return second - first


class PartTimer:
    """Marks where denoising and decoding begin and end, for one video after another."""

    def __init__(self, net: nn.Module, decoder: nn.Module) -> None:
        self.marks: list[tuple[str, Mark]] = []
        net.register_forward_pre_hook(lambda *_: self.begin("denoising", after="end"))
        decoder.register_forward_pre_hook(lambda *_: self.begin("decode", after="denoising"))
        decoder.register_forward_hook(lambda *_: self.end())

    def begin(self, name: str, *, after: str) -> None:
        """Mark the first of several calls."""
        if not self.marks or self.marks[-1][0] == after:
            self.marks.append((name, record_mark()))

    def end(self) -> None:
        """Mark the last of several calls."""
        if self.marks[-1][0] == "end":
            self.marks.pop()
        self.marks.append(("end", record_mark()))

    def time_videos(self, make: Callable[[], object]) -> list[Parts]:
        """Make videos and return their parts; the time between two videos counts for the later one."""
        self.marks = []
        began, last = sync(), record_mark()
        make()
        whole, spent, videos = sync() - began, 0.0, list[Parts]()
        for start in range(0, len(self.marks), 3):
            marks = [last, *(mark for _, mark in self.marks[start : start + 3])]
            last = marks[-1]
            parts = [seconds_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
            spent += sum(parts)
            videos.append(Parts(sum(parts), *parts, after=0.0))
        videos[-1] = replace(videos[-1], whole=videos[-1].whole + whole - spent, after=whole - spent)
        return videos
