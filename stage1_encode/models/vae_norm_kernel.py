"""The decoder's normalization and SiLU in one pass over memory. Shapes: F frames, X Y height and width, C channels."""

import torch
import triton
from torch import Tensor
from triton import language as tl

ELEMENTS_PER_PROGRAM = 4096  # what one program holds in registers


@triton.jit
def norm_silu_kernel(x, gamma, out, row_count, channels: tl.constexpr, rows: tl.constexpr):
    """Write SiLU(gamma * x / rms(x)) of rows of C channels."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)  # int64: a large chunk can exceed 2^31 elements
    column = tl.arange(0, channels)
    offsets = row[:, None] * channels + column[None, :]
    mask = row[:, None] < row_count
    value = tl.load(x + offsets, mask, 0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)  # the bound of diffusers
    factor = tl.load(gamma + column).to(tl.float32)[None, :] * tl.sqrt(tl.full((), channels, tl.float32))
    value = value / length[:, None] * factor
    tl.store(out + offsets, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask)


def norm_silu_triton(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Do what `vae_ops.norm_silu` does; x and out must be contiguous and C a power of two."""
    assert x.is_contiguous() and out.is_contiguous(), (x.shape, x.stride(), out.stride())
    channels = x.shape[-1]
    row_count, rows = x.numel() // channels, max(1, ELEMENTS_PER_PROGRAM // channels)
    with torch.cuda.device(x.device):  # Triton launches on the current device, not on that of its arguments
        norm_silu_kernel[(triton.cdiv(row_count, rows),)](x, gamma, out, row_count, channels, rows)
