"""Tensors in 8 bits (float8 e4m3) with one scale per row, and their products.

A row of an input is a token, a row of a weight an output, so a product's error does not depend on the other tokens of
the batch, nor on the rank that computes it. Shapes: M rows, D inputs, F outputs; (... D) has any leading dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.low_precision.quantize_kernel import fused_quantize

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
SMALLEST_PEAK = 1e-12  # a row of zeros has a scale too


class QuantizedRows(NamedTuple):
    """A tensor in 8 bits: the numbers are values * scale."""

    values: Tensor  # (... D) float8
    scale: Tensor  # (... 1) float32


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Round x (... D) to 8 bits; the largest number of each row becomes the largest of float8."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return QuantizedRows(*fused_quantize(x, False))
    # In a compiled graph these operations become part of the kernel that computes x.
    peak = x.abs().amax(-1, keepdim=True).float().clamp_min(SMALLEST_PEAK)
    return QuantizedRows((x.float() * (LARGEST / peak)).to(FLOAT8), peak / LARGEST)


def quantize_gelu(x: Tensor) -> QuantizedRows:
    """Round gelu(x), tanh form, to 8 bits."""
    if x.is_cuda:  # a compiled reduction would read x (... D), the widest tensor of a block, twice
        return QuantizedRows(*fused_quantize(x, True))
    return quantize_rows(gelu(x, approximate="tanh"))


def multiply_rows(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None) -> Tensor:
    """x W^T + bias (... F) in bfloat16 of x (... D) and weight (F D), summed in float32."""
    # A private name of torch, but the one that torchao calls; `scaled_mm` is public from torch 2.10 only.
    flat = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        x.scale.flatten(0, -2),
        weight.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,  # its error is a hundredth of that of 8 bits
    )
    return flat.unflatten(0, x.values.shape[:-1])
