"""Which device a process computes on, and working ahead of it."""

import os

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
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        seen = f"has {there} of them" if there else "torch sees none here"
        raise ValueError(f"device=cuda: local rank {number} needs a GPU of its own, and {seen}; give --device cpu")
    return torch.device("cuda", number)


def begin_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device, perhaps not there yet: work on the GPU waits for it, the CPU must wait for `mark`."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work begun on a GPU so far; None for the CPU, whose work is done when it returns."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
