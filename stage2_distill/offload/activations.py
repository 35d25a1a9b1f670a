"""Activations that wait in host memory for their backward pass: copies there and back run beside the arithmetic.

The host is far ahead of the device, so that memory which is free once a copy has ended would not be free in time: what
leaves is held until the stream of the arithmetic has waited for the copy; what comes back takes memory of that stream.
They come back in reverse order, and each lets those below it be fetched.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_distill.offload.prefetch import copy_streams


@dataclass(eq=False)
class OffloadedActivation:
    """One tensor in pinned host memory."""

    host_copy: Tensor
    device: torch.device
    restored: bool = False
    device_copy: Tensor | None = None
    copy_event: torch.cuda.Event | None = None

    def start_fetch(self) -> None:
        """Start copying it to the device, unless that has been done."""
        if self.device_copy is None:
            load_stream, store_stream = copy_streams(self.device)
            self.device_copy = torch.empty(self.host_copy.shape, dtype=self.host_copy.dtype, device=self.device)
            load_stream.wait_stream(torch.cuda.current_stream(self.device))
            load_stream.wait_stream(store_stream)
            with torch.cuda.stream(load_stream):
                self.device_copy.copy_(self.host_copy, non_blocking=True)
                self.copy_event = load_stream.record_event()


PREFETCH_COUNT = 2  # tensors that are fetched before they are asked for
PENDING_OFFLOADS: list[tuple[Tensor, torch.cuda.Event]] = []  # the last one lifted
OFFLOADED_ACTIVATIONS: list[
    "weakref.ref[OffloadedActivation]"
] = []  # the last one comes back first; those of a dropped graph are gone


def release_finished(main: torch.cuda.Stream) -> None:
    """Give up the memory of what has left."""
    while PENDING_OFFLOADS:
        _, copied = PENDING_OFFLOADS.pop()
        main.wait_event(copied)


def offload_tensor(value: Tensor) -> OffloadedActivation:
    """Start copying a tensor to host memory, from where `land` brings it back."""
    main = torch.cuda.current_stream(value.device)
    _, store_stream = copy_streams(value.device)
    release_finished(main)
    offloaded = OffloadedActivation(torch.empty(value.shape, dtype=value.dtype, pin_memory=True), value.device)
    store_stream.wait_stream(main)
    with torch.cuda.stream(store_stream):
        offloaded.host_copy.copy_(value, non_blocking=True)
        PENDING_OFFLOADS.append((value, store_stream.record_event()))
    OFFLOADED_ACTIVATIONS.append(weakref.ref(offloaded))
    return offloaded


def restore_tensor(offloaded: OffloadedActivation) -> Tensor:
    """The tensor on its device again; those that were lifted before it are fetched ahead."""
    main = torch.cuda.current_stream(offloaded.device)
    release_finished(main)
    offloaded.start_fetch()
    offloaded.restored = True
    while OFFLOADED_ACTIVATIONS and is_restored(OFFLOADED_ACTIVATIONS[-1]()):
        OFFLOADED_ACTIVATIONS.pop()
    for waiting in reversed(OFFLOADED_ACTIVATIONS[-PREFETCH_COUNT:]):
        earlier = waiting()
        if earlier is not None:
            earlier.start_fetch()
    assert offloaded.device_copy is not None
    assert offloaded.copy_event is not None
    main.wait_event(offloaded.copy_event)
    return offloaded.device_copy


def is_restored(offloaded: OffloadedActivation | None) -> bool:
    """Whether nobody waits for it any longer."""
    return offloaded is None or offloaded.restored


@contextmanager
def offload_activations(reference: Tensor) -> Iterator[None]:
    """Tensors of tokens that the autograd graph saves meanwhile wait in host memory; on a CPU they stay.

    like: all tokens (B N D); half as many are lifted too.
    """

    def pack(value: Tensor) -> Tensor | OffloadedActivation:
        tokens = (
            value.dim() == reference.dim() and value.shape[-1] == reference.shape[-1] and value.dtype == reference.dtype
        )
        return offload_tensor(value) if value.is_cuda and tokens and 2 * value.numel() >= reference.numel() else value

    def unpack(kept: Tensor | OffloadedActivation) -> Tensor:
        return restore_tensor(kept) if isinstance(kept, OffloadedActivation) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
