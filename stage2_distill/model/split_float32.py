"""Float32 master weights stored as the bf16 weights that the network computes with and the 16 bits that they lack.

Joined, they are the float32 number, bit for bit, in the memory of one float32. Shapes: any.
"""

import torch
from torch import Tensor

ROUNDING_OFFSET, HALF_WORD = 1 << 15, 1 << 16


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest bf16 weights and int16 remainders of float32 numbers."""
    bits = master.view(torch.int32)
    # Ties round away from zero: half of those rounded to even would leave 2^15, which int16 cannot hold.
    weight = (bits + ROUNDING_OFFSET) >> 16
    remainder = bits - (weight << 16)  # in [-2^15, 2^15)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers of bf16 weights and int16 remainders."""
    bits = weight.view(torch.int16).to(torch.int32) * HALF_WORD + remainder.to(torch.int32)
    return bits.view(torch.float32)
