"""Quantising a tensor in one pass over GPU memory, where torch.compile's reductions of wide rows need two.

This module is imported only on a machine with a GPU. The kernel has no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_at, values_at, scale_at, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)  # one program per row; row * WIDTH may exceed int32
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = tl.load(x_at + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        # x/2 (1 + tanh(u)) = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    peak = tl.maximum(tl.max(tl.abs(x)), 1e-12)
    tl.store(values_at + row * WIDTH + column, (x * (448.0 / peak)).to(tl.float8e4nv), mask=mask)
    tl.store(scale_at + row, peak / 448.0)


@torch.library.custom_op("ti2v::quantize_rows", mutates_args=())
def fused_quantize(x: Tensor, apply_gelu: bool) -> tuple[Tensor, Tensor]:
    """Values (... D) float8 and scales (... 1) float32 of x (... D), or of gelu(x), tanh form."""
    x = x.contiguous()
    values, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)  # triton's ranges are powers of two
    warps = 4 if block <= 4096 else 8
    _quantize_rows_kernel[(scale.numel(),)](
        x, values, scale, WIDTH=width, GELU=apply_gelu, BLOCK=block, num_warps=warps
    )
    return values, scale


@fused_quantize.register_fake
def _(x: Tensor, apply_gelu: bool) -> tuple[Tensor, Tensor]:
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return values, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
