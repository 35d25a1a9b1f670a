"""Streams offloaded tensors between host memory and the GPU: the copies overlap with the computation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import TypeAlias

import torch
from torch import Tensor

from stage2_distill.offload.pinned_memory import space

BERTHS = 3  # one group arrives, one is there, one leaves
Parts: TypeAlias = dict[str, Tensor]


@dataclass
class Berth:
    """Device memory that one group after another takes: with memory of its own each would hold much at a time, because
    the host is far ahead of the device.
    """

    room: Tensor  # bytes
    left: torch.cuda.Event | None = None  # the last group has

    def take(self, group: Parts, device: torch.device) -> Parts:
        """Room for a group; what lives on the device is given as it is."""
        size = sum(space(value) for value in group.values() if not value.is_cuda)
        if size > self.room.numel():
            self.room, self.left = torch.empty(size, dtype=torch.uint8, device=device), None
        here, used = {}, 0
        for name, value in group.items():
            here[name] = value
            if not value.is_cuda:
                part = self.room[used : used + value.numel() * value.element_size()]
                here[name] = part.view(value.dtype).view(value.shape)
                used += space(value)
        return here


@dataclass(frozen=True)
class Visit:
    """A group on the device."""

    home: Parts
    here: Parts
    berth: Berth
    arrived: torch.cuda.Event | None  # None where all lives on the device


def carried(groups: Iterable[Parts], device: torch.device, *, back: bool = True) -> Iterator[Parts]:
    """Each group of tensors on `device` until the next is asked for, copied there one group ahead.

    After its turn it is copied `back` to where it lives; it is there once the device has caught up. What lives on the
    device is given as it is.
    """
    if device.type != "cuda":
        yield from groups
        return
    main = torch.cuda.current_stream(device)
    inward, outward = streams(device)
    inward.wait_stream(main)
    held: list[Tensor] = []  # until `main` has waited for the copies
    berths = cycle(Berth(torch.empty(0, dtype=torch.uint8, device=device)) for _ in range(BERTHS))
    for visit in one_ahead(fetch(group, device, next(berths), held) for group in groups):
        if visit.arrived is None:
            yield visit.here
            continue
        main.wait_event(visit.arrived)
        yield visit.here
        last = send_home(visit, outward, main) if back else main
        visit.berth.left = last.record_event()
    main.wait_stream(outward)


@cache
def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of all copies in and out."""
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


def fetch(group: Parts, device: torch.device, berth: Berth, held: list[Tensor]) -> Visit:
    """Start copying a group to a berth."""
    if all(value.is_cuda for value in group.values()):
        return Visit(group, group, berth, None)
    inward, _ = streams(device)
    here = berth.take(group, device)
    held.append(berth.room)
    if berth.left is None:
        inward.wait_stream(torch.cuda.current_stream(device))  # which used the memory before
    else:
        inward.wait_event(berth.left)
    with torch.cuda.stream(inward):
        for name, value in here.items():
            if value is not group[name]:
                value.copy_(group[name], non_blocking=True)
        return Visit(group, here, berth, inward.record_event())


def send_home(visit: Visit, outward: torch.cuda.Stream, main: torch.cuda.Stream) -> torch.cuda.Stream:
    """Start copying a group to where it lives; the stream on which it leaves."""
    outward.wait_stream(main)
    with torch.cuda.stream(outward):
        for name, value in visit.here.items():
            if value is not visit.home[name]:
                visit.home[name].copy_(value, non_blocking=True)
    return outward
