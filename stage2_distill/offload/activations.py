"""Offloads saved activations to pinned host memory until their backward pass; copies overlap with the computation.

The CPU runs far ahead of the device, so memory must not depend on when a copy ends:

    forward     store stream copies x0, then x1, ...; the device copy of x_n is held until the main stream has waited
                for its copy, which happens when x_{n+1} is offloaded
    backward    in reverse order: restoring x_n starts to load x_{n-1} and x_{n-2} too, into memory of the main stream
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_distill.offload.prefetch import copy_streams

PREFETCH_COUNT = 2  # tensors that are loaded before they are needed


@dataclass(eq=False)
class OffloadedActivation:
    """One tensor in pinned host memory."""

    host_copy: Tensor
    device: torch.device
    restored: bool = False
    loaded: tuple[Tensor, torch.cuda.Event] | None = None  # the tensor on the device and the end of its copy

    def start_load(self) -> tuple[Tensor, torch.cuda.Event]:
        """Start copying it to the device, unless that has been done; returns `loaded`."""
        if self.loaded is None:
            load_stream, store_stream = copy_streams(self.device)
            device_copy = torch.empty(self.host_copy.shape, dtype=self.host_copy.dtype, device=self.device)
            load_stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still use the new memory
            load_stream.wait_stream(store_stream)
            with torch.cuda.stream(load_stream):
                device_copy.copy_(self.host_copy, non_blocking=True)
                self.loaded = device_copy, load_stream.record_event()
        return self.loaded


class ActivationOffloader:
    """Offloads what the autograd graph saves; the blocks of all networks share one, as each loads ahead for others."""

    def __init__(self) -> None:
        self.leaving: tuple[Tensor, torch.cuda.Event] | None = None  # the last tensor that was offloaded
        # the last is restored first; weak, because a graph may be dropped without a backward pass
        self.stack: list[weakref.ref[OffloadedActivation]] = []

    @contextmanager
    def saved_tensors(self, reference: Tensor) -> Iterator[None]:
        """Offload tensors like `reference` (B N D), or half as large, that the graph saves meanwhile; none on a CPU."""
        kind = (reference.dim(), reference.shape[-1:], reference.dtype)

        def pack(value: Tensor) -> Tensor | OffloadedActivation:
            same_kind = value.is_cuda and (value.dim(), value.shape[-1:], value.dtype) == kind
            return self.offload(value) if same_kind and 2 * value.numel() >= reference.numel() else value

        def unpack(saved: Tensor | OffloadedActivation) -> Tensor:
            return self.restore(saved) if isinstance(saved, OffloadedActivation) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def offload(self, value: Tensor) -> OffloadedActivation:
        """Start copying a tensor to host memory."""
        main, (_, store_stream) = torch.cuda.current_stream(value.device), copy_streams(value.device)
        self._release_leaving(main)
        offloaded = OffloadedActivation(torch.empty(value.shape, dtype=value.dtype, pin_memory=True), value.device)
        store_stream.wait_stream(main)
        with torch.cuda.stream(store_stream):
            offloaded.host_copy.copy_(value, non_blocking=True)
            self.leaving = value, store_stream.record_event()
        self.stack.append(weakref.ref(offloaded))
        return offloaded

    def restore(self, offloaded: OffloadedActivation) -> Tensor:
        """The tensor on its device again; starts to load those that were offloaded just before it."""
        main = torch.cuda.current_stream(offloaded.device)
        self._release_leaving(main)
        device_copy, arrival_event = offloaded.start_load()
        offloaded.restored = True
        while self.stack and ((last := self.stack[-1]()) is None or last.restored):  # None: its graph is gone
            self.stack.pop()
        for earlier in reversed([reference() for reference in self.stack[-PREFETCH_COUNT:]]):
            if earlier is not None:
                earlier.start_load()
        main.wait_event(arrival_event)
        return device_copy

    def _release_leaving(self, main: torch.cuda.Stream) -> None:
        if self.leaving is not None:
            main.wait_event(self.leaving[1])  # `main` may reuse the memory only after the copy
            self.leaving = None
