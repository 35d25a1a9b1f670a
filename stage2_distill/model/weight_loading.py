"""Weights of a diffusers folder, read directly into a network: each rank reads only its own part of each tensor.

One file is open at a time, so a rank's host memory stays below its own part plus one file, whatever the model's size.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # no public equivalent

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.model.split_float32 import split_master
from stage2_distill.weight_files.stored_weights import StoredTensor, weight_files


def read_weights(folder: Path, tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor] | None = None) -> None:
    """Fill `tensors`, plain or sharded, from a diffusers model folder, each in its own dtype and on its own device.

    `remainders` of bf16 tensors receive the other bits of stored float32 numbers.
    Raises ValueError if names or shapes differ or a file is damaged.
    """
    missing = set(tensors)  # names that no file has had yet
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:  # maps the file; only requested parts are read
                for name in file.keys():  # noqa: SIM118  # the file is not iterable itself
                    if name not in tensors:
                        raise ValueError(f"{path}: holds {name}, which the model of its config.json does not have")
                    fill_parameter(tensors[name], file.get_slice(name), f"{path}: {name}", (remainders or {}).get(name))
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); download the model again") from error
    if missing:
        raise ValueError(f"{folder}: lacks {len(missing)} weights, such as {min(missing)}")


@torch.no_grad()
def copy_weights(
    masters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor]
) -> None:
    """Fill `tensors` from a network with the same sharding, which is faster than reading the files again."""
    for name, master in masters:
        write_parameter(local_tensor(master), tensors[name], remainders.get(name))


def fill_parameter(target: Tensor, source: StoredTensor, label: str, remainder: Tensor | None = None) -> None:
    """Copy this rank's part of one stored tensor; `label` names it in the ValueError for a wrong shape."""
    if list(target.shape) != source.get_shape():
        raise ValueError(f"{label} has shape {source.get_shape()}, the model needs {list(target.shape)}")
    if not isinstance(target, DTensor):
        write_parameter(source[...], target, remainder)
        return
    size, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if all(size):  # a small tensor leaves some ranks without a part
        part = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
        write_parameter(source[part], target, remainder)


@torch.no_grad()
def write_parameter(value: Tensor, target: Tensor, remainder: Tensor | None) -> None:
    """Write this rank's part of a value, split into weight and remainder if there is a remainder to fill."""
    target = local_tensor(target)
    if remainder is None:
        target.copy_(value)
        return
    high, low = split_master(value.to(target.device).float())
    target.copy_(high)
    local_tensor(remainder).copy_(low)  # target and remainder together hold the float32 number
