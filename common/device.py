"""The device of a process, and copies that run while the CPU works ahead."""

import os
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """The device of this process: cpu, cuda, or auto, which is the GPU if there is one.

    With several GPUs, each process takes the one of its local rank (torchrun). ValueError if that does not exist.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"device=cuda: local rank {local_rank} needs its own GPU, torch sees {gpus}; give --device cpu"
        )
    return torch.device("cuda", local_rank)


def describe_device(device: torch.device) -> str:
    """Name and memory of a GPU, or `the CPU`."""
    if device.type == "cpu":
        return "the CPU"
    total = torch.cuda.get_device_properties(device).total_memory
    return f"{torch.cuda.get_device_name(device)}, {total / 2**30:.1f} GiB"


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, possibly still in progress.

    Work on the GPU waits for the copy. Before the CPU reads a copy from the GPU, it must wait for `record_event`.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory would block the CPU
    return tensor.to(device, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event after all work that was started on a GPU so far; None for the CPU, whose work is always complete."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)  # waiting for it sleeps instead of occupying a core
    event.record(torch.cuda.current_stream(device))
    return event


class MovableTensors(Protocol):
    """Tensors of a model that leave the GPU while it is idle."""

    def move_to(self, device: torch.device) -> None:
        """Move the tensors to a device, in place."""


class OffloadedTensors:
    """Constant tensors that move between a GPU and pinned host memory; a move to the host copies nothing."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors, self.host_copies = list(tensors), list[Tensor]()

    def move_to(self, device: torch.device) -> None:
        """Move the tensors to a device, in place."""
        if self.tensors[0].device.type == device.type:
            return
        if not self.host_copies:  # made once, since the tensors never change
            is_on_gpu = self.tensors[0].device.type == "cuda"
            self.host_copies = [
                copy_async(t.data, torch.device("cpu")) if is_on_gpu else t.data.pin_memory() for t in self.tensors
            ]
            torch.cuda.synchronize()
        for tensor, host_copy in zip(self.tensors, self.host_copies, strict=True):
            tensor.data = host_copy if device.type == "cpu" else host_copy.to(device, non_blocking=True)
