"""Digests of tensors and the kind of machine: stored by `make.py`, compared by `tests/test_old_files.py`."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

CPU = Path("/proc/cpuinfo")
CPU_FACTS = ("vendor_id", "cpu family", "model")
LIBRARIES = ("torch", "diffusers", "transformers")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    joined = hashlib.sha256()
    for name in sorted(tensors):
        joined.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return joined.hexdigest()


def group_digests(checkpoint: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each group of a checkpoint: student, critic, ema and the two optimizers."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in checkpoint.items():
        groups.setdefault(name.split(".")[0], {})[name] = value
    return {group: digest(groups[group]) for group in sorted(groups)}


def machine() -> dict[str, str]:
    """CPU and library versions, on which the rounding of results depends."""
    lines = CPU.read_text(encoding="utf-8").splitlines() if CPU.is_file() else []
    stated = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind = {name: stated.get(name, "") for name in CPU_FACTS}
    kind["instructions"] = torch.backends.cpu.get_cpu_capability()
    return kind | {library: version(library) for library in LIBRARIES}
