"""Activations that wait in host memory for their backward pass: copies there and back run beside the arithmetic.

Blocks come back in reverse order, so that with one the next below is fetched.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_distill.carry import streams


@dataclass(eq=False)
class Lifted:
    """One tensor in pinned host memory."""

    home: Tensor
    device: torch.device
    here: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Start copying it to the device, unless that has been done."""
        if self.here is None:
            inward, outward = streams(self.device)
            inward.wait_stream(outward)
            with torch.cuda.stream(inward):
                self.here = self.home.to(self.device, non_blocking=True)
                self.arrived = inward.record_event()


WAITING: list["weakref.ref[Lifted]"] = []  # the last one comes back first; those of a dropped graph are gone


def lift(value: Tensor) -> Lifted:
    """Start copying a tensor to host memory, from where `land` brings it back."""
    _, outward = streams(value.device)
    lifted = Lifted(torch.empty(value.shape, dtype=value.dtype, pin_memory=True), value.device)
    outward.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(outward):
        lifted.home.copy_(value, non_blocking=True)
    value.record_stream(outward)
    WAITING.append(weakref.ref(lifted))
    return lifted


def land(lifted: Lifted) -> Tensor:
    """The tensor on its device again; the one that was lifted before it is fetched ahead."""
    lifted.fetch()
    while WAITING and WAITING[-1]() in (None, lifted):
        WAITING.pop()
    below = WAITING[-1]() if WAITING else None
    if below is not None:
        below.fetch()
    here = lifted.here
    assert here is not None
    assert lifted.arrived is not None
    main = torch.cuda.current_stream(lifted.device)
    main.wait_event(lifted.arrived)
    here.record_stream(main)
    return here


@contextmanager
def at_home(like: Tensor) -> Iterator[None]:
    """Tensors as large as `like` that the autograd graph saves meanwhile wait in host memory; on a CPU they stay."""

    def pack(value: Tensor) -> Tensor | Lifted:
        return lift(value) if value.is_cuda and value.shape == like.shape and value.dtype == like.dtype else value

    def unpack(kept: Tensor | Lifted) -> Tensor:
        return land(kept) if isinstance(kept, Lifted) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
