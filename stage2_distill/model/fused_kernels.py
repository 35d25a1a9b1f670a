"""Fused kernels for inference on a GPU, where torch.compile leaves memory bandwidth unused. They have no gradient.

This module is imported only on a machine with a GPU. The kernels compute in float32 and round at most as often as the
plain forms in layers.py. Shapes: B batch, N tokens, D width, H heads, d head size, F feed-forward width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_rope_kernel(  # type: ignore[no-untyped-def]
    x_at, weight_at, cos_at, sin_at, out_at, tokens, eps, WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)  # one program per token; row * WIDTH may exceed int32
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = tl.load(x_at + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_at + column, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps) * weight
    first, second = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    angle = (row % tokens) * PAIRS + tl.arange(0, BLOCK // 2) % PAIRS  # the angles of a token are those of every head
    cos, sin = tl.load(cos_at + angle), tl.load(sin_at + angle)
    rotated = tl.join(first * cos - second * sin, first * sin + second * cos)
    tl.store(out_at + row * WIDTH + column, tl.reshape(rotated, (BLOCK,)).to(out_at.dtype.element_ty), mask=mask)


@torch.library.custom_op("ti2v::norm_rotate", mutates_args=())
def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm of x (B N D) over all heads, then rotation of its pairs by angles (1 N 1 d/2): (B N D)."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)  # triton's ranges are powers of two
    _rms_norm_rope_kernel[(batch * tokens,)](
        x, weight, cos, sin, out, tokens, eps, WIDTH=width, PAIRS=cos.shape[-1], BLOCK=block, num_warps=8
    )
    return out


@rms_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ti2v::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), tanh form, of x (B N D): (B N F)."""
    # cuBLAS applies the activation in the product's epilogue, which saves a pass over (B N F).
    flat = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:2])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])
