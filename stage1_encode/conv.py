"""Causal convolutions of the VAE on Hopper's matrix units: plans, folded weights, and the call of the kernel.

Shapes: F frames, X Y height and width, C channels in, N channels out, K = taps x C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from stage1_encode.conv_kernel import kernel

PLACES = 64  # of a warpgroup's tile, and channels of a step


@dataclass(frozen=True)
class Plan:
    """What a convolution does; each plan is compiled once."""

    channels: int  # C
    outputs: int  # N of one output place
    depth: int = 3  # taps in time
    side: int = 3  # taps in height and in width; 2 where space doubles
    rows: int = 4  # of the picture in a warpgroup's tile of 64 places
    columns: int = 256  # outputs in a tile
    time: int = 1  # output frames an input frame
    space: int = 1  # output rows an input row; 2: nearest neighbours, then 3x3, folded into four phases of 2x2
    repeats: int = 0  # residual: 0 none; else `outputs * time * space^2` are its channels, each this many times
    halves: int = 1  # output frames that share a frame of the residual


def fold(weight: Tensor, plan: Plan) -> Tensor:
    """The weight (N' K) of a plan from a convolution's weight (N C t y x), as bf16.

    Nearest neighbours and then 3x3 see, from each of the four phases of a place, two rows and two columns: taps that
    fall on the same place are added up. Where time doubles, the outputs are those of the first frame, then the second.
    """
    if plan.space == 2:
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1.0, 1, 0], [0, 0, 1]]], device=weight.device)
        folded = torch.einsum("pay,qbx,nctyx->pqntabc", sums, sums, weight.float())
        return folded.flatten(3).flatten(0, 2).bfloat16().contiguous()
    return weight.permute(0, 2, 3, 4, 1).flatten(1).bfloat16().contiguous()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, *, residual: Tensor | None = None, skip: int = 0
) -> Tensor:
    """Convolve x (F + depth - 1 X Y C) bf16 with a folded weight (N' K); (F' X' Y' N) bf16.

    `residual`, whose first `skip` output frames are left out, is added.
    """
    frames, height, width = x.shape[0] - plan.depth + 1, x.shape[1], x.shape[2]
    shape = (frames * plan.time, height * plan.space, width * plan.space, plan.outputs)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    box, block = [1, plan.rows, PLACES // plan.rows, PLACES], [plan.columns, PLACES]
    source = TensorDescriptor.from_tensor(x, box, NVMMASharedLayout(128, 16, rank=4))
    factors = TensorDescriptor.from_tensor(weight, block, NVMMASharedLayout(128, 16, rank=2))
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    size = (frames, height, width, skip)
    kernel[(blocks,)](source, factors, bias, bias if residual is None else residual, out, size, plan, num_warps=4)
    return out
