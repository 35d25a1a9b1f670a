"""State that lives in host memory and visits the GPU: copies there and back run beside the arithmetic."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

SLAB, ALIGNED = 1 << 30, 512  # bytes
Parts: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Visit:
    """A group on the device."""

    home: Parts
    here: Parts
    arrived: torch.cuda.Event


class Host:
    """Where tensors are to live: in pinned host memory, if they are offloaded from a GPU, else where they are.

    Torch rounds each pinned request up to a power of two, for weights half as much again: so it is asked for slabs.
    """

    def __init__(self, *, offload: bool) -> None:
        self.offload = offload
        self.slab = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def home(self, value: Tensor) -> Tensor:
        """The tensor itself, or its copy in host memory."""
        return self.carve(value) if self.offload and value.is_cuda else value

    def carve(self, value: Tensor) -> Tensor:
        """A copy of a tensor in a slab."""
        size = value.numel() * value.element_size()
        if self.used + size > self.slab.numel():
            self.slab, self.used = pinned(max(SLAB, size)), 0
        part = self.slab[self.used : self.used + size].view(value.dtype).view(value.shape)
        self.used += -(-size // ALIGNED) * ALIGNED
        return part.copy_(value)


def pinned(size: int) -> Tensor:
    """Some bytes of pinned host memory."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def carried(groups: Iterable[Parts], device: torch.device, *, back: bool = True) -> Iterator[Parts]:
    """Each group of tensors on `device`, copied there one group ahead and, after its turn, `back` to where it lives.

    What lives on the device is given as it is. What goes back is there once the device has caught up.
    """
    if device.type != "cuda":
        yield from groups
        return
    inward, outward = streams(device)
    inward.wait_stream(torch.cuda.current_stream())
    for visit in one_ahead(fetch(group, device, inward) for group in groups):
        torch.cuda.current_stream().wait_event(visit.arrived)
        yield visit.here
        if back:
            send_home(visit, outward)
    torch.cuda.current_stream().wait_stream(outward)


@cache
def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of all copies in and out; memory that one stream has freed serves no other, so there are few."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def one_ahead(items: Iterable[Visit]) -> Iterator[Visit]:
    """The same items, each given when the next one has been made."""
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def fetch(group: Parts, device: torch.device, stream: torch.cuda.Stream) -> Visit:
    """Start copying a group to the device."""
    main = torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        here = {name: value.to(device, non_blocking=True) for name, value in group.items()}
        for name, value in here.items():
            if value is not group[name]:
                value.record_stream(main)
        return Visit(group, here, stream.record_event())


def send_home(visit: Visit, stream: torch.cuda.Stream) -> None:
    """Start copying a group to where it lives."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for name, value in visit.here.items():
            if value is not visit.home[name]:
                visit.home[name].copy_(value, non_blocking=True)
                value.record_stream(stream)
