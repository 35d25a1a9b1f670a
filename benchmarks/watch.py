"""When the parts of a video end, by marks on the GPU's own queue: watching makes nothing wait."""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
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
    """Marks where the denoiser and the decoder begin and end."""

    def __init__(self, net: nn.Module, decoder: nn.Module) -> None:
        self.marks: dict[str, Mark] = {}
        net.register_forward_pre_hook(lambda *_: self.first("denoising"))
        decoder.register_forward_pre_hook(lambda *_: self.first("decode"))
        decoder.register_forward_hook(lambda *_: self.last("end"))

    def first(self, name: str) -> None:
        """Mark a place, the first time."""
        if name not in self.marks:
            self.marks[name] = mark()

    def last(self, name: str) -> None:
        """Mark a place, the last time."""
        self.marks[name] = mark()

    def video(self, make: Callable[[], object]) -> Parts:
        """Make one video."""
        self.marks = {}
        began, start = sync(), mark()
        make()
        whole = sync() - began
        steps = [start, *(self.marks[name] for name in ("denoising", "decode", "end"))]
        before, denoising, decode = (between(a, b) for a, b in zip(steps, steps[1:], strict=False))
        return Parts(whole, before, denoising, decode, whole - before - denoising - decode)
