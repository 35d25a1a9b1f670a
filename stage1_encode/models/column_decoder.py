"""A part of each frame decoded by itself: exactly the pixels that the whole decoder gives, by a halo that is cut off.

Convolutions are local, so the columns of a part need only the columns around them. Attention is not; a decoder's
`begin`, at the latents' size and under 2 % of the work, therefore has complete frames. Each later stage gets the
columns that its output and all stages behind it need, computes as if the frame ended there, and loses what that made
wrong at inner borders. At the picture's own borders nothing is cut: the zeros beyond them are the whole decoder's.

The frames that causal convolutions remember are those of the same columns, so a part depends on no other part.
Shapes: T H W latent frames, height, width; F frames; X Y height and width at a stage; C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reach:
    """How far a stage of a decoder looks to each side."""

    before: int  # convolutions of three taps, one after another, at the size of its input
    scale: int = 1  # output columns per input column
    after: int = 0  # convolutions of three taps at the size of its output

    def input_columns(self, output: range, size: int) -> range:
        """Return those of `size` input columns that decide a range of output columns."""
        start = (output.start - self.after) // self.scale - self.before
        stop = -(-(output.stop + self.after) // self.scale) + self.before
        return range(max(0, start), min(size, stop))


class StagedDecoder(Protocol):
    """A decoder in stages, which remembers the frames that came before."""

    stages: nn.ModuleList  # without attention; each maps (F X Y C), and whether a video's first frame is in it, alone
    reaches: list[Reach]  # of the stages

    def begin(self, z: Tensor) -> Tensor:
        """(T H W C) -> (T H W C'), the input of the first stage."""
        ...

    def reset_cache(self) -> None:
        """Forget the previous frames."""
        ...

    def free_memory(self) -> None:
        """Release what is kept from one chunk to the next."""
        ...


def plan_columns(own: range, size: int, reaches: Sequence[Reach]) -> list[range]:
    """Return the columns of each stage's input, and of the last output, that give the pixels of `own` latent columns.

    size: number of latent columns.
    """
    sizes = list(accumulate((reach.scale for reach in reaches), mul, initial=size))
    scale = prod(reach.scale for reach in reaches)
    columns = [range(own.start * scale, own.stop * scale)]
    for reach, width in zip(reversed(reaches), reversed(sizes[:-1]), strict=True):
        columns.insert(0, reach.input_columns(columns[0], width))
    return columns


def own_columns(size: int, part: int, parts: int) -> range:
    """Return the latent columns of one of several parts: equally many for each, so that neighbours may overlap."""
    width = -(-size // parts)  # rounded up
    start = min(part * width, size - width)
    return range(start, start + width)


def join_parts(parts: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Return whole frames (F X Y 3) from all parts (F x y 3), of latents of this height and width."""
    axis = split_axis(height, width)
    size = (height, width)[axis - 1]
    kept, end = [], 0  # latent columns before `end` are joined already: neighbours may overlap
    for number, part in enumerate(parts):
        own = own_columns(size, number, len(parts))
        scale = part.shape[axis] // len(own)
        kept.append(part.narrow(axis, scale * (end - own.start), scale * (own.stop - end)))
        end = own.stop
    return torch.cat(kept, dim=axis)


def split_axis(height: int, width: int) -> int:
    """Return the axis of (F X Y C) along which a frame is split: the longer one, for its halos are less of it."""
    return 1 if height > width else 2


class ColumnDecoder(nn.Module):
    """Decodes one of several parts of each frame; "columns" are rows if a frame is higher than wide."""

    def __init__(self, decoder: StagedDecoder, part: int, parts: int) -> None:
        super().__init__()
        self.decoder, self.part, self.parts = decoder, part, parts

    def reset_cache(self) -> None:
        """Forget the previous frames, at the start of a video."""
        self.decoder.reset_cache()

    def free_memory(self) -> None:
        """Release cache and workspace until the next video."""
        self.decoder.free_memory()

    def forward(self, z: Tensor, *, first: bool) -> Tensor:
        """Decode latent frames (T H W C) that follow those of the previous call; returns this part's (F x y 3)."""
        axis, reaches = split_axis(*z.shape[1:3]), self.decoder.reaches
        own = own_columns(z.shape[axis], self.part, self.parts)
        columns = plan_columns(own, z.shape[axis], reaches)
        x, start = self.decoder.begin(z), 0  # x begins at this column of its stage
        for stage, reach, needed in zip(self.decoder.stages, reaches, columns, strict=False):
            # contiguous, as the kernels require; a copy takes a hundredth of the convolutions' time
            x = x.narrow(axis, needed.start - start, len(needed)).contiguous()
            x, start = stage(x, first=first), needed.start * reach.scale
        return x.narrow(axis, columns[-1].start - start, len(columns[-1]))
