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

from stage2_distill.offload.prefetch import streams


@dataclass(eq=False)
class Lifted:
    """One tensor in pinned host memory."""

    home: Tensor
    device: torch.device
    landed: bool = False
    here: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Start copying it to the device, unless that has been done."""
        if self.here is None:
            inward, outward = streams(self.device)
            self.here = torch.empty(self.home.shape, dtype=self.home.dtype, device=self.device)
            inward.wait_stream(torch.cuda.current_stream(self.device))
            inward.wait_stream(outward)
            with torch.cuda.stream(inward):
                self.here.copy_(self.home, non_blocking=True)
                self.arrived = inward.record_event()


AHEAD = 2  # tensors that are fetched before they are asked for
LEAVING: list[tuple[Tensor, torch.cuda.Event]] = []  # the last one lifted
WAITING: list["weakref.ref[Lifted]"] = []  # the last one comes back first; those of a dropped graph are gone


def let_go(main: torch.cuda.Stream) -> None:
    """Give up the memory of what has left."""
    while LEAVING:
        _, left = LEAVING.pop()
        main.wait_event(left)


def lift(value: Tensor) -> Lifted:
    """Start copying a tensor to host memory, from where `land` brings it back."""
    main = torch.cuda.current_stream(value.device)
    _, outward = streams(value.device)
    let_go(main)
    lifted = Lifted(torch.empty(value.shape, dtype=value.dtype, pin_memory=True), value.device)
    outward.wait_stream(main)
    with torch.cuda.stream(outward):
        lifted.home.copy_(value, non_blocking=True)
        LEAVING.append((value, outward.record_event()))
    WAITING.append(weakref.ref(lifted))
    return lifted


def land(lifted: Lifted) -> Tensor:
    """The tensor on its device again; those that were lifted before it are fetched ahead."""
    main = torch.cuda.current_stream(lifted.device)
    let_go(main)
    lifted.fetch()
    lifted.landed = True
    while WAITING and gone(WAITING[-1]()):
        WAITING.pop()
    for waiting in reversed(WAITING[-AHEAD:]):
        below = waiting()
        if below is not None:
            below.fetch()
    assert lifted.here is not None
    assert lifted.arrived is not None
    main.wait_event(lifted.arrived)
    return lifted.here


def gone(lifted: Lifted | None) -> bool:
    """Whether nobody waits for it any longer."""
    return lifted is None or lifted.landed


@contextmanager
def at_home(like: Tensor) -> Iterator[None]:
    """Tensors of tokens that the autograd graph saves meanwhile wait in host memory; on a CPU they stay.

    like: all tokens (B N D); half as many are lifted too.
    """

    def pack(value: Tensor) -> Tensor | Lifted:
        tokens = value.dim() == like.dim() and value.shape[-1] == like.shape[-1] and value.dtype == like.dtype
        return lift(value) if value.is_cuda and tokens and 2 * value.numel() >= like.numel() else value

    def unpack(kept: Tensor | Lifted) -> Tensor:
        return land(kept) if isinstance(kept, Lifted) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
