"""Arithmetic on the tokens of a video: into tokens, their places, their times, and out of the last block.

Shapes: B batch, N tokens, K times (1 or 2), D width, H heads, d head size, C channels, T H W latent size.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

if torch.cuda.is_available():  # triton comes with torch's CUDA builds only
    from stage2_distill.kernels import linear_add, norm_modulate

Rope: TypeAlias = tuple[Tensor, Tensor]  # cos and sin (1 N 1 d/2) float32


def per_time(rows: Tensor, tokens: int, given: int | Tensor) -> Tensor:
    """The row of each token, (B N D) or (B 1 D), from rows (B K D): the first for `given` tokens, the last after."""
    if rows.shape[1] == 1:
        return rows
    late = torch.arange(tokens, device=rows.device) >= given
    if torch.is_grad_enabled():  # a row's gradient is a sum over tokens: quick behind `where`, slow behind an index
        return torch.where(late[:, None], rows[:, 1:], rows[:, :1])
    return rows[:, late.long()]  # reads one row a token, where both rows would be twice as much as the token itself


def modulate(x: Tensor, shift: Tensor, scale: Tensor, given: int | Tensor) -> Tensor:
    """x (B N D) * (1 + scale) + shift, with rows (B K D)."""
    return x * (1 + per_time(scale, x.shape[1], given)) + per_time(shift, x.shape[1], given)


def bare(x: Tensor, layer: nn.Module) -> bool:
    """Whether a kernel without gradient may stand for a layer: one with an adapter adds to its result."""
    return x.is_cuda and not torch.is_grad_enabled() and type(layer) is nn.Linear


def add_to(onto: Tensor, layer: nn.Linear, x: Tensor) -> Tensor:
    """`onto` (B N D) and a layer's result on x (B N D)."""
    if not bare(x, layer):
        return onto + layer(x)
    total = onto + layer.bias
    linear_add(x, layer.weight, total)
    return total


def modulated(norm: nn.LayerNorm, x: Tensor, rows: Tensor, first: int, given: int | Tensor) -> Tensor:
    """x (B N D) normalised, and modulated by rows (B K 6 D) `first` (shift) and the next (scale), in float32."""
    if x.is_cuda and not torch.is_grad_enabled() and isinstance(given, int):
        return norm_modulate(x, rows, first, given, norm.eps)
    return modulate(norm(x.float()), rows[:, :, first], rows[:, :, first + 1], given).type_as(x)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs of x (B N H d) by their place's angles, in float32 (RoFormer, arXiv 2104.09864)."""
    cos, sin = rope
    first, second = rearrange(x, "b n h (p two) -> two b n h p", two=2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)


def embed(patches: nn.Conv3d, latents: Tensor) -> Tensor:
    """Tokens (B N D) of latents (B C T H W): one product, where a convolution would lay its result out anew."""
    pt, ph, pw = patches.kernel_size
    rows = rearrange(latents, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return linear(rows, patches.weight.flatten(1), patches.bias)


def finish(norm: nn.Module, x: Tensor, rows: Tensor, given: int) -> Tensor:
    """x (B N D) normalised and modulated in float32 by rows (B K 2 D): shift and scale."""
    shift, scale = rows.unbind(2)
    return modulate(norm(x.float()), shift, scale, given).type_as(x)


@cache
def finisher(compiled: bool) -> Callable[..., Tensor]:
    """`finish` as it is or compiled."""
    return torch.compile(finish, dynamic=False, fullgraph=True) if compiled else finish
