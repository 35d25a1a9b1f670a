"""Float32 master weights in two halves: the bf16 weight that the network computes with, and the 16 bits it lacks.

Both together are the float32 number, bit for bit, in the memory of one float32. Shapes: any.
"""

import torch
from torch import Tensor

HALF, WORD = 1 << 15, 1 << 16


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weights and int16 remainders of float32 numbers.

    The weight is the nearest bf16 (halfway cases away from zero: to even would make two remainders look the same).
    """
    bits = master.view(torch.int32)
    weight = (bits + HALF) >> 16
    remainder = bits - (weight << 16)  # in [-2^15, 2^15)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 numbers of bf16 weights and int16 remainders."""
    bits = weight.view(torch.int16).to(torch.int32) * WORD + remainder.to(torch.int32)
    return bits.view(torch.float32)
