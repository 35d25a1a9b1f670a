"""Streams groups of tensors between pinned host memory and the GPU; the copies overlap with the computation.

Group n uses staging buffer n mod 3, so that one group arrives while one is used and one leaves:

    load stream     in 0    in 1    in 2    in 3      waits until the buffer's last group has left
    main stream             use 0   use 1   use 2     waits for "in"
    store stream                    out 0   out 1     waits for "use"

The CPU queues all of this far ahead of the GPU; only streams wait, through events.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, cycle, pairwise
from typing import Self, TypeAlias

import torch
from torch import Tensor

from stage2_distill.offload.pinned_memory import aligned_bytes

STAGING_BUFFERS = 3  # see the timeline
TensorGroup: TypeAlias = dict[str, Tensor]


@cache
def copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of all copies to a device and from it: one pair, as a GPU has one copy engine per direction."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class StagingBuffer:
    """Device memory for one group at a time."""

    # With an allocation per group, many groups would hold memory at once, because the CPU runs ahead of the device.
    def __init__(self, device: torch.device) -> None:
        self.device, (self.load_stream, self.store_stream) = device, copy_streams(device)
        self.storage = torch.empty(0, dtype=torch.uint8, device=device)
        self.outgrown: list[Tensor] = []  # smaller storages, kept because copies may still use them
        self.host_group: TensorGroup = {}
        self.device_group: TensorGroup = {}
        self.arrival_event: torch.cuda.Event | None = None  # None if the group is on the device anyway
        self.free_event: torch.cuda.Event | None = None  # after the last group has left; None for new memory

    def acquire(self, group: TensorGroup) -> Self:
        """Start copying a group to the device; tensors that are there already stand for themselves."""
        self.host_group, self.device_group, self.arrival_event = group, group, None
        if not all(value.is_cuda for value in group.values()):
            self.device_group = self._allocate_views(group)
            if self.free_event is None:  # work queued on the current stream may have used the memory before
                self.load_stream.wait_stream(torch.cuda.current_stream(self.device))
            else:
                self.load_stream.wait_event(self.free_event)
            self.arrival_event = copy_group(self.host_group, self.device_group, self.load_stream)
        return self

    def release(self, main: torch.cuda.Stream, *, write_back: bool) -> None:
        """Free the buffer after what `main` has queued and, with `write_back`, a copy of the group to host memory."""
        if write_back:
            self.store_stream.wait_stream(main)
            self.free_event = copy_group(self.device_group, self.host_group, self.store_stream)
        else:
            self.free_event = main.record_event()

    def _allocate_views(self, group: TensorGroup) -> TensorGroup:
        size = sum(aligned_bytes(value) for value in group.values() if not value.is_cuda)
        if size > self.storage.numel():
            self.outgrown.append(self.storage)
            self.storage, self.free_event = torch.empty(size, dtype=torch.uint8, device=self.device), None
        views, used = dict(group), 0
        for name, value in group.items():
            if not value.is_cuda:
                views[name] = self.storage[used : used + value.nbytes].view(value.dtype).view(value.shape)
                used += aligned_bytes(value)
        return views


def prefetched_groups(
    groups: Iterable[TensorGroup], device: torch.device, *, write_back: bool = True
) -> Iterator[TensorGroup]:
    """Yield each group on `device`, copied there one group ahead; it is valid until the next is requested."""
    # With `write_back`, host memory has a group's new values once the device has caught up.
    if device.type != "cuda":
        yield from groups
        return
    main, (load_stream, store_stream) = torch.cuda.current_stream(device), copy_streams(device)
    load_stream.wait_stream(main)
    buffers = cycle([StagingBuffer(device) for _ in range(STAGING_BUFFERS)])
    acquired = (next(buffers).acquire(group) for group in groups)
    for buffer, _ in pairwise(chain(acquired, [None])):  # acquires the next group before it yields this one
        assert buffer is not None
        if buffer.arrival_event is None:
            yield buffer.device_group
            continue
        main.wait_event(buffer.arrival_event)
        yield buffer.device_group
        buffer.release(main, write_back=write_back)
    main.wait_stream(store_stream)  # the memory of the buffers is freed to `main`


def copy_group(source: TensorGroup, target: TensorGroup, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Start copying on `stream` those tensors that differ between the groups; returns the event after the copies."""
    with torch.cuda.stream(stream):
        for name, value in source.items():
            if value is not target[name]:
                target[name].copy_(value, non_blocking=True)
        return stream.record_event()
