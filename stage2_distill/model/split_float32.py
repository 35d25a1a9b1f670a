"""Float32 master weights in two halves: the bf16 weight that the network computes with, and the 16 bits it lacks.

Both together are the float32 number, bit for bit, in the memory of one float32. Shapes: any.
"""

import torch
from torch import Tensor

ROUNDING_OFFSET, HALF_WORD = 1 << 15, 1 << 16


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weights and int16 remainders of float32 numbers.

    The weight is the nearest bf16 (halfway cases away from zero: to even would make two remainders look the same).
    """
    bits = master.view(torch.int32)
    weight = (bits + ROUNDING_OFFSET) >> 16
    remainder = bits - (weight << 16)  # in [-2^15, 2^15)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers of bf16 weights and int16 remainders."""
    bits = weight.view(torch.int16).to(torch.int32) * HALF_WORD + remainder.to(torch.int32)
    return bits.view(torch.float32)
