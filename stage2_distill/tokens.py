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

Rope: TypeAlias = tuple[Tensor, Tensor]  # cos and sin (1 N 1 d/2) float32


def per_time(rows: Tensor, tokens: int, given: int | Tensor) -> Tensor:
    """The row of each token, (B N D) or (B 1 D), from rows (B K D): the first for `given` tokens, the last after."""
    if rows.shape[1] == 1:
        return rows
    first = torch.arange(tokens, device=rows.device)[:, None] < given
    return torch.where(first, rows[:, :1], rows[:, 1:])


def modulate(x: Tensor, shift: Tensor, scale: Tensor, given: int | Tensor) -> Tensor:
    """x (B N D) * (1 + scale) + shift, with rows (B K D)."""
    return x * (1 + per_time(scale, x.shape[1], given)) + per_time(shift, x.shape[1], given)


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
