"""The decoder's normalisation and SiLU in one pass over memory. Shapes: F frames, X Y height and width, C channels."""

import torch
import triton
from torch import Tensor
from triton import language as tl

ELEMENTS = 4096  # that a program holds at once


@triton.jit
def kernel(x, gamma, out, places, channels: tl.constexpr, rows: tl.constexpr):
    """Rows of C channels at unit root mean square, times gamma, through SiLU."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, channels)
    where = row[:, None] * channels + column[None, :]
    inside = row[:, None] < places
    value = tl.load(x + where, inside, 0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    factor = tl.load(gamma + column).to(tl.float32)[None, :] * tl.sqrt(tl.full((), channels, tl.float32))
    value = value / length[:, None] * factor
    tl.store(out + where, (value * tl.sigmoid(value)).to(out.dtype.element_ty), inside)


def normalise(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """What `vae_ops.normalise` does; x and out are contiguous and C is a power of two."""
    assert x.is_contiguous() and out.is_contiguous(), (x.shape, x.stride(), out.stride())
    channels = x.shape[-1]
    places, rows = x.numel() // channels, max(1, ELEMENTS // channels)
    with torch.cuda.device(x.device):
        kernel[(triton.cdiv(places, rows),)](x, gamma, out, places, channels, rows)
