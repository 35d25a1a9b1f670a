"""The second moment in few bits: bf16, or 8 bits in blocks.

One step changes an average by a thousandth, less than the distance of two bf16 or 8-bit numbers, so that ordinary
rounding would leave it where it is for ever. Rounding up or down by chance keeps the mean right; the chance is a hash
of the element's place and the step, so that it depends on neither the rank nor what ran before.
Shapes: N elements, K blocks of 64.
"""

import math

import torch
from torch import Tensor

BLOCK_SIZE = 64
LEVELS_PER_OCTAVE = 16  # an octave; neighbouring codes differ by 4.4 %, and a block spans 254 codes, a factor of 6e4
TOP_CODE = 255


def is_quantizable(shape: torch.Size) -> bool:
    """Whether rows of a parameter are whole blocks, so that no sharding of rows cuts one; others stay float32."""
    return len(shape) > 1 and math.prod(shape[1:]) % BLOCK_SIZE == 0


def hashed_uniform(count: int, first_index: Tensor, step: Tensor) -> Tensor:
    """`count` numbers in [0, 1) that depend on the places `start`.. and on the step (int64 scalars)."""
    mask = 0xFFFFFFFF
    index = torch.arange(count, device=first_index.device) + first_index
    mixed = (index * 0x9E3779B1 + (index >> 32) * 0x85EBCA77 + step * 0xC2B2AE3D) & mask
    for multiplier in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & mask
    return ((mixed ^ (mixed >> 16)) >> 8).float() / (1 << 24)


def to_bf16(value: Tensor, chances: Tensor) -> Tensor:
    """Round float32 to bf16, up or down by chance."""
    bits = value.view(torch.int32) + (chances * (1 << 16)).to(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def quantize_blocks(value: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (K 64) uint8 and tops (K) int16 of non-negative float32 numbers (K 64).

    Code c > 0 means 2^((top + c - 255) / 16), code 0 means 0. Below the lowest level numbers are raised to it: a
    smaller second moment would make a larger step.
    """
    largest = value.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    top = torch.floor(torch.log2(largest) * LEVELS_PER_OCTAVE) + 1
    lower_code = torch.floor(torch.log2(value) * LEVELS_PER_OCTAVE - top + TOP_CODE).clamp(1, TOP_CODE - 1)
    low, high = code_value(lower_code, top), code_value(lower_code + 1, top)
    code = lower_code + ((value - low) / (high - low) > uniforms)
    return torch.where(value > 0, code, 0).to(torch.uint8), top.squeeze(1).to(torch.int16)


def dequantize_blocks(codes: Tensor, tops: Tensor) -> Tensor:
    """Float32 numbers (K 64) of codes (K 64) and tops (K)."""
    return torch.where(codes > 0, code_value(codes.float(), tops.float()[:, None]), 0)


def code_value(code: Tensor, top: Tensor) -> Tensor:
    """The number that a code means."""
    return torch.exp2((top + code - TOP_CODE) / LEVELS_PER_OCTAVE)
