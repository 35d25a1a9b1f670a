"""Weights of a folder or file, read directly into a network: each rank reads only its own part of each tensor.

A file is mapped only while a tensor is read, so a rank's host memory stays below its own part plus one file.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # no public equivalent

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.model.split_float32 import join_master, split_master
from stage2_distill.weight_files.lora_files import LoraFile
from stage2_distill.weight_files.stored_tensors import StoredTensor
from stage2_distill.weight_files.stored_weights import check_names, read_weight_table


def read_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    remainders: Mapping[str, Tensor] | None = None,
    loras: Sequence[LoraFile] = (),
) -> None:
    """Fill `tensors`, plain or sharded, from a folder or file of weights, each in its own dtype and on its own device.

    `remainders` of bf16 tensors receive the other bits of stored float32 numbers. LoRA files are added in float32.
    Raises ValueError if names or shapes differ or a file is damaged.
    """
    table = read_weight_table(path, loras)
    check_names(path, table, tensors)
    for name, stored in table.items():  # in the order of the file
        fill_parameter(tensors[name], stored, f"{path}: {name}", (remainders or {}).get(name))


@torch.no_grad()
def copy_weights(
    masters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor]
) -> None:
    """Fill `tensors` from a network with the same sharding, which is faster than reading the files again."""
    for name, master in masters:
        write_parameter(local_tensor(master), tensors[name], remainders.get(name))


@torch.no_grad()
def blend_weights(
    masters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor], remainders: Mapping[str, Tensor], share: float
) -> None:
    """Move the weights of a network with the same sharding to (1 - share) own + share master, in float32."""
    for name, master in masters:
        own, remainder = local_tensor(tensors[name]), remainders.get(name)
        if remainder is None:
            own.lerp_(local_tensor(master), share)
        else:
            joined = join_master(own, local_tensor(remainder))
            write_parameter(joined.lerp_(local_tensor(master), share), own, remainder)


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
