"""Which device a process computes on, and working ahead of it."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """The device of this process: cpu, cuda or auto, which is the GPU where there is one.

    On a machine with several GPUs, the one of torchrun's local rank. ValueError for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device={name}: choose cpu, cuda or auto")
    if name == "cpu":
        return torch.device("cpu")
    local_rank, gpu_count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpu_count:
        reason = f"has {gpu_count} of them" if gpu_count else "torch sees none here"
        raise ValueError(
            f"device=cuda: local rank {local_rank} needs a GPU of its own, and {reason}; give --device cpu"
        )
    return torch.device("cuda", local_rank)


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, perhaps not there yet: work on the GPU waits for it, the CPU must wait for `mark`."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work begun on a GPU so far; None for the CPU, whose work is done when it returns."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class OffloadedTensors:
    """Tensors that live in the host's memory and visit a GPU: leaving it copies nothing, for they do not change."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors, self.host_copies = list(tensors), list[Tensor]()

    def move_to(self, device: torch.device) -> None:
        """Bring them to a device."""
        if self.tensors[0].device.type == device.type:
            return
        if not self.host_copies:
            gpu = self.tensors[0].device.type == "cuda"
            self.host_copies = [
                copy_async(t.data, torch.device("cpu")) if gpu else t.data.pin_memory() for t in self.tensors
            ]
            torch.cuda.synchronize()
        for tensor, home in zip(self.tensors, self.host_copies, strict=True):
            tensor.data = home if device.type == "cpu" else home.to(device, non_blocking=True)
