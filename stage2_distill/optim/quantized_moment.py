"""The second moment in blocks of 8-bit codes.

One step changes the average by a thousandth, less than the distance of two codes, so that rounding to the nearest would
never change it. Stochastic rounding keeps the mean right; its random numbers are a hash of the element's index and the
step, so that they depend neither on the rank nor on what ran before.
Shapes: N elements, K blocks of 64.
"""

import math

import torch
from torch import Tensor

BLOCK_SIZE = 64
LEVELS_PER_OCTAVE = 16  # neighbouring codes differ by 4.4 %, and a block spans 254 codes, a factor of 6e4
TOP_CODE = 255


def is_quantizable(shape: torch.Size) -> bool:
    """Whether each row of a parameter is a number of blocks, so that sharding by rows cuts none."""
    return len(shape) > 1 and math.prod(shape[1:]) % BLOCK_SIZE == 0


def hashed_uniform(count: int, first_index: Tensor, step: Tensor) -> Tensor:
    """Numbers (count) in [0, 1) that depend on the indices from `first_index` on and on the step (int64 scalars)."""
    mask = 0xFFFFFFFF  # int64 arithmetic, because torch has no uint32 products; the kernel's is uint32
    index = torch.arange(count, device=first_index.device) + first_index
    mixed = (index * 0x9E3779B1 + (index >> 32) * 0x85EBCA77 + step * 0xC2B2AE3D) & mask
    for multiplier in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & mask
    return ((mixed ^ (mixed >> 16)) >> 8).float() / (1 << 24)


def quantize_blocks(value: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (K 64) uint8 and tops (K) int16 of non-negative float32 numbers (K 64).

    Code c > 0 means 2^((top + c - 255) / 16), code 0 means 0. Numbers below the lowest level are raised to it, because
    a smaller second moment would make a larger step. uniforms (K 64): in [0, 1), for the rounding.
    """
    largest = value.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # log2(0) is -inf
    top = torch.floor(torch.log2(largest) * LEVELS_PER_OCTAVE) + 1  # so that `largest` is below code 255
    lower_code = torch.floor(torch.log2(value) * LEVELS_PER_OCTAVE - top + TOP_CODE).clamp(1, TOP_CODE - 1)
    low, high = code_value(lower_code, top), code_value(lower_code + 1, top)
    code = lower_code + ((value - low) / (high - low) > uniforms)
    return torch.where(value > 0, code, 0).to(torch.uint8), top.squeeze(1).to(torch.int16)


def dequantize_blocks(codes: Tensor, tops: Tensor) -> Tensor:
    """Float32 numbers (K 64) that codes (K 64) with tops (K) mean."""
    return torch.where(codes > 0, code_value(codes.float(), tops.float()[:, None]), 0)


def code_value(code: Tensor, top: Tensor) -> Tensor:
    """The number that a code above 0 means."""
    return torch.exp2((top + code - TOP_CODE) / LEVELS_PER_OCTAVE)
