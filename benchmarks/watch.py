"""When the parts of a video end, by marks on the GPU's own queue: watching makes nothing wait."""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median
from typing import TypeAlias

import torch
from torch import nn

from benchmarks.clock import GPU, sync

Mark: TypeAlias = float | torch.cuda.Event


@dataclass(frozen=True)
class Parts:
    """Seconds of one video, and of its parts, which add up to it."""

    whole: float
    before: float  # text, first frame, and the files that are opened
    denoising: float
    decode: float
    after: float  # the file is ready so much later than the last frame


def medians(found: Sequence[Parts]) -> Parts:
    """Of every part by itself."""
    return Parts(*(median(values) for values in zip(*map(astuple, found), strict=True)))


def mark() -> Mark:
    """This place in the GPU's queue, or the time without a GPU."""
    if not GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Mark, second: Mark) -> float:
    """Seconds."""
    if isinstance(first, torch.cuda.Event):
        return first.elapsed_time(second) / 1e3
    assert isinstance(second, float)
    return second - first


class Watch:
    """Marks where the denoiser and the decoder begin and end, of one video after the other."""

    def __init__(self, net: nn.Module, decoder: nn.Module) -> None:
        self.marks: list[tuple[str, Mark]] = []
        net.register_forward_pre_hook(lambda *_: self.begin("denoising", after="end"))
        decoder.register_forward_pre_hook(lambda *_: self.begin("decode", after="denoising"))
        decoder.register_forward_hook(lambda *_: self.end())

    def begin(self, name: str, *, after: str) -> None:
        """Mark the first of several calls."""
        if not self.marks or self.marks[-1][0] == after:
            self.marks.append((name, mark()))

    def end(self) -> None:
        """Mark the last of several calls."""
        if self.marks[-1][0] == "end":
            self.marks.pop()
        self.marks.append(("end", mark()))

    def videos(self, make: Callable[[], object]) -> list[Parts]:
        """Make videos; what comes before the first and after the last one's decode is theirs, a gap the later one's."""
        self.marks = []
        began, last = sync(), mark()
        make()
        whole, spent, found = sync() - began, 0.0, list[Parts]()
        for place in range(0, len(self.marks), 3):
            steps = [last, *(one for _, one in self.marks[place : place + 3])]
            last = steps[-1]
            parts = [between(a, b) for a, b in zip(steps, steps[1:], strict=False)]
            spent += sum(parts)
            found.append(Parts(sum(parts), *parts, after=0.0))
        found[-1] = replace(found[-1], whole=found[-1].whole + whole - spent, after=whole - spent)
        return found
