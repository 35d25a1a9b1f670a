"""Weights of a diffusers folder, read straight to where they belong: each rank takes only its own part of each tensor.

One file is open at a time, so a rank's host memory stays under its own part plus one file, whatever the model.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.model.split_float32 import split_master

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class StoredTensor(Protocol):
    """A tensor in a safetensors file; indexing reads only the part asked for."""

    def get_shape(self) -> list[int]:
        """Shape of the whole."""

    def __getitem__(self, index: object) -> Tensor:
        """Read a part."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers model folder; ValueError where it has none."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    raise ValueError(f"{folder}: holds no {WEIGHTS_FILE} (nor its .index.json)")


def read_weights(folder: Path, tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor] | None = None) -> None:
    """Fill `tensors`, plain or sharded, from a diffusers model folder, each in its own precision and on its own device.

    `remainders` of bf16 tensors take the bits that a stored float32 number has more.
    Raises ValueError where names or shapes differ, or a file is damaged.
    """
    missing = set(tensors)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in tensors:
                        raise ValueError(f"{path}: holds {name}, which the model of its config.json does not have")
                    fill_parameter(tensors[name], file.get_slice(name), f"{path}: {name}", (remainders or {}).get(name))
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fetch the model again") from error
    if missing:
        raise ValueError(f"{folder}: lacks {len(missing)} weights, such as {min(missing)}")


def copy_weights(
    masters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor]
) -> None:
    """Fill `tensors` from a network that is sharded alike: quicker than to read the files again."""
    with torch.no_grad():
        for name, master in masters:
            low = remainders.get(name)
            write_parameter(
                local_tensor(master), local_tensor(tensors[name]), None if low is None else local_tensor(low)
            )


def fill_parameter(target: Tensor, source: StoredTensor, label: str, remainder: Tensor | None = None) -> None:
    """Copy this rank's part of one stored tensor."""
    if list(target.shape) != source.get_shape():
        raise ValueError(f"{label} has shape {source.get_shape()}, the model needs {list(target.shape)}")
    with torch.no_grad():
        if not isinstance(target, DTensor):
            write_parameter(source[...], target, remainder)
            return
        size, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        if all(size):
            local_slices = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            write_parameter(
                source[local_slices],
                target.to_local(),
                remainder.to_local() if isinstance(remainder, DTensor) else remainder,
            )


def write_parameter(value: Tensor, target: Tensor, remainder: Tensor | None) -> None:
    """Copy a stored value, split in halves if there is a remainder to keep."""
    if remainder is None:
        target.copy_(value)
        return
    high, low = split_master(value.to(target.device).float())
    target.copy_(high)
    remainder.copy_(low)
