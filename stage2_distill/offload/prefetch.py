"""Streams offloaded tensors between host memory and the GPU: the copies overlap with the computation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import TypeAlias

import torch
from torch import Tensor

from stage2_distill.offload.pinned_memory import aligned_bytes

STAGING_BUFFERS = 3  # one group arrives, one is there, one leaves
TensorGroup: TypeAlias = dict[str, Tensor]


@dataclass
class StagingBuffer:
    """Device memory that one group after another takes: with memory of its own each would hold much at a time, because
    the host is far ahead of the device.
    """

    storage: Tensor  # bytes
    copy_event: torch.cuda.Event | None = None  # the last group has

    def place_views(self, group: TensorGroup, device: torch.device) -> TensorGroup:
        """Room for a group; what lives on the device is given as it is."""
        size = sum(aligned_bytes(value) for value in group.values() if not value.is_cuda)
        if size > self.storage.numel():
            self.storage, self.copy_event = torch.empty(size, dtype=torch.uint8, device=device), None
        views, used = {}, 0
        for name, value in group.items():
            views[name] = value
            if not value.is_cuda:
                view = self.storage[used : used + value.numel() * value.element_size()]
                views[name] = view.view(value.dtype).view(value.shape)
                used += aligned_bytes(value)
        return views


@dataclass(frozen=True)
class Transfer:
    """A group on the device."""

    host_group: TensorGroup
    device_group: TensorGroup
    staging_buffer: StagingBuffer
    arrival_event: torch.cuda.Event | None  # None where all lives on the device


def prefetched_groups(
    groups: Iterable[TensorGroup], device: torch.device, *, write_back: bool = True
) -> Iterator[TensorGroup]:
    """Each group of tensors on `device` until the next is asked for, copied there one group ahead.

    After its turn it is copied `back` to where it lives; it is there once the device has caught up. What lives on the
    device is given as it is.
    """
    if device.type != "cuda":
        yield from groups
        return
    main = torch.cuda.current_stream(device)
    load_stream, store_stream = copy_streams(device)
    load_stream.wait_stream(main)
    keep_alive: list[Tensor] = []  # until `main` has waited for the copies
    staging_buffers = cycle(
        StagingBuffer(torch.empty(0, dtype=torch.uint8, device=device)) for _ in range(STAGING_BUFFERS)
    )
    for transfer in with_lookahead(
        copy_to_device(group, device, next(staging_buffers), keep_alive) for group in groups
    ):
        if transfer.arrival_event is None:
            yield transfer.device_group
            continue
        main.wait_event(transfer.arrival_event)
        yield transfer.device_group
        last = copy_to_host(transfer, store_stream, main) if write_back else main
        transfer.staging_buffer.copy_event = last.record_event()
    main.wait_stream(store_stream)


@cache
def copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of all copies in and out."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def with_lookahead(items: Iterable[Transfer]) -> Iterator[Transfer]:
    """The same items, each given when the next one has been made."""
    previous = None
    for item in items:
        if previous is not None:
            yield previous
        previous = item
    if previous is not None:
        yield previous


def copy_to_device(
    group: TensorGroup, device: torch.device, staging_buffer: StagingBuffer, keep_alive: list[Tensor]
) -> Transfer:
    """Start copying a group to a berth."""
    if all(value.is_cuda for value in group.values()):
        return Transfer(group, group, staging_buffer, None)
    load_stream, _ = copy_streams(device)
    views = staging_buffer.place_views(group, device)
    keep_alive.append(staging_buffer.storage)
    if staging_buffer.copy_event is None:
        load_stream.wait_stream(torch.cuda.current_stream(device))  # which used the memory before
    else:
        load_stream.wait_event(staging_buffer.copy_event)
    with torch.cuda.stream(load_stream):
        for name, value in views.items():
            if value is not group[name]:
                value.copy_(group[name], non_blocking=True)
        return Transfer(group, views, staging_buffer, load_stream.record_event())


def copy_to_host(transfer: Transfer, store_stream: torch.cuda.Stream, main: torch.cuda.Stream) -> torch.cuda.Stream:
    """Start copying a group to where it lives; the stream on which it leaves."""
    store_stream.wait_stream(main)
    with torch.cuda.stream(store_stream):
        for name, value in transfer.device_group.items():
            if value is not transfer.host_group[name]:
                transfer.host_group[name].copy_(value, non_blocking=True)
    return store_stream
