"""Tensors that are read from their file only when they are indexed, and what other programs do to them.

Shapes: n outputs, m inputs, r rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

READ_REMEDY = "download or copy it again"


class StoredTensor(Protocol):
    """A tensor in a file; indexing reads only the requested part."""

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""

    def __getitem__(self, index: object) -> Tensor:
        """Read a part."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a safetensors file, which is mapped only while a part is read: mapped pages count as memory."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # as the file names it, such as BF16

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""
        return list(self.shape)

    def __getitem__(self, index: object) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                part: Tensor = file.get_slice(self.key)[index]
                return part
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: cannot be read ({error}); {READ_REMEDY}") from error


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of a file of torch.save, or in memory."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""
        return list(self.tensor.shape)

    def __getitem__(self, index: object) -> Tensor:
        return self.tensor[index]  # type: ignore[index]


@dataclass(frozen=True)
class ScaledTensor:
    """A float8 tensor with its scale: one number, or one per output (n 1); the value is the product, float32."""

    tensor: StoredTensor
    scale: Tensor

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""
        return self.tensor.get_shape()

    def __getitem__(self, index: object) -> Tensor:
        scale = self.scale if self.scale.numel() == 1 else self.scale.expand(self.get_shape())[index]  # type: ignore[index]
        return self.tensor[index].float() * scale.float()


@dataclass(frozen=True)
class WeightDelta:
    """What one file adds to a weight: the product of B (n r) and A (r m), or a dense difference."""

    label: str  # file and key, for errors
    factor: float
    first: Tensor | None = None  # A
    second: Tensor | None = None  # B
    dense: Tensor | None = None

    def full(self, shape: list[int]) -> Tensor:
        """The delta, float32; ValueError if it does not fit a weight of `shape`."""
        if self.dense is not None:
            delta = self.dense.float()
        else:
            assert self.first is not None and self.second is not None
            # of a convolution, A has its kernel's dimensions and B ones
            first, second = self.first.float().flatten(1), self.second.float().flatten(1)
            if second.shape[1] != first.shape[0]:
                raise ValueError(f"{self.label}: its factors have ranks {first.shape[0]} and {second.shape[1]}")
            delta = second @ first
        if delta.numel() != torch.Size(shape).numel() or delta.shape[0] != shape[0]:
            raise ValueError(f"{self.label} is for a weight of {list(delta.shape)}, the model has {shape}")
        return delta.reshape(shape) * self.factor


@dataclass(frozen=True)
class EditedTensor:
    """A tensor with deltas added, summed in float32."""

    tensor: StoredTensor
    deltas: tuple[WeightDelta, ...]

    def get_shape(self) -> list[int]:
        """Shape of the full tensor."""
        return self.tensor.get_shape()

    def __getitem__(self, index: object) -> Tensor:
        part = self.tensor[index].float()
        for delta in self.deltas:
            part = part + delta.full(self.get_shape())[index]  # type: ignore[index]
        return part
