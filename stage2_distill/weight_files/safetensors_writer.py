"""Safetensors files written tensor by tensor, so that a file of any size takes the memory of one tensor.

Layout: 8 bytes length of the header, JSON header padded to 8 bytes, tensors in the header's order
(https://github.com/huggingface/safetensors). The library's own writer needs all tensors of a file at once.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DIFFUSERS_FILE = "diffusion_pytorch_model"  # stem of the files of a diffusers model folder
SHARD_BYTES = 5 * 10**9  # of one file of a sharded model: the hub's usual size


@dataclass(frozen=True)
class TensorShape:
    """Shape and dtype of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    path: Path, shapes: Mapping[str, TensorShape], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file of the tensors of `shapes`, which come from `tensors` in the same order, in any dtype."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    entries: dict[str, dict[str, object]] = {}
    for name, one in shapes.items():
        end = offset + one.num_bytes
        entries[name] = {"dtype": DTYPE_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header | entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, one), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert name == given and tuple(tensor.shape) == one.shape, (name, given, tensor.shape, one.shape)
            file.write(tensor.to("cpu", one.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_model_folder(
    folder: Path, shapes: Mapping[str, TensorShape], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
) -> None:
    """Write the weights of a diffusers model folder: one file, or several and their index."""
    shards, size = [dict[str, TensorShape]()], 0
    for name, one in shapes.items():
        if shards[-1] and size + one.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = one
        size += one.num_bytes
    count, stream = len(shards), iter(tensors)
    names = [f"-{number:05d}-of-{count:05d}" if count > 1 else "" for number in range(1, count + 1)]
    files = [f"{DIFFUSERS_FILE}{name}.safetensors" for name in names]
    for file, shard in zip(files, shards, strict=True):
        # `zip` takes from its first argument first, so the stream loses nothing at a shard's end
        write_tensors(folder / file, shard, (pair for _, pair in zip(shard, stream, strict=False)), {})
    assert next(stream, None) is None, "tensors that no file has"
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(one.num_bytes for one in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{DIFFUSERS_FILE}.safetensors.index.json").write_text(json.dumps(index, indent=1))
