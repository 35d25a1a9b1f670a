"""The decoder's convolutions as products with folded weights: what a kernel must do, and PyTorch's own way to do it.

Shapes: F frames, X Y height and width, C channels in, N channels out, N' columns of the product, K = taps x C.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Plan:
    """What a convolution does."""

    channels: int  # C
    outputs: int  # N
    depth: int = 3  # taps in time: this frame and those before it
    side: int = 3  # taps in height and in width; 2 where space doubles
    rows: int = 4  # of the picture in a warpgroup's tile of 64 places
    columns: int = 256  # outputs in a tile
    time: int = 1  # output frames an input frame
    space: int = 1  # output rows an input row; 2 = nearest neighbours and then 3x3, folded into four phases of 2x2
    repeats: int = 0  # of each channel of the residual; 0 = no residual
    halves: int = 1  # output frames that share one frame of the residual

    @property
    def product(self) -> int:
        """N'."""
        return self.outputs * self.time * self.space**2


def fold(weight: Tensor, plan: Plan) -> Tensor:
    """The weight (N' K) of a plan from a convolution's weight (N' C t y x).

    Nearest neighbours and then 3x3 see, from each of the four phases of a place, two rows and two columns: taps that
    fall on the same place are added up. Where time doubles, the outputs are those of the first frame, then the second.
    """
    if plan.space == 2:
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1.0, 1, 0], [0, 0, 1]]], device=weight.device)
        phases = torch.einsum("pay,qbx,nctyx->pqntabc", sums, sums, weight.float())
        return rearrange(phases, "p q n t a b c -> (p q n) (t a b c)").to(weight.dtype).contiguous()
    return rearrange(weight, "n c t y x -> n (t y x c)").contiguous()


def by_library(
    x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, *, residual: Tensor | None = None, skip: int = 0
) -> Tensor:
    """Convolve x (F + depth - 1 X Y C) with a folded weight (N' K) and a bias (N, doubled with time); (F' X' Y' N).

    `residual` is added: of the shape of the output, or where space doubles a smaller one whose first `skip` output
    frames are left out.
    """
    filters = weight.unflatten(1, (plan.depth, plan.side, plan.side, plan.channels)).permute(0, 4, 1, 2, 3)
    video = x[None].permute(0, 4, 1, 2, 3)  # in this order torch sees that the channels lie last, and copies nothing
    edge = plan.side // 2
    whole = bias if plan.space == 1 else bias.repeat(plan.space**2)
    out = functional.conv3d(video, filters, whole, padding=(0, edge, edge))
    out = spread(out.permute(0, 2, 3, 4, 1)[0], plan)
    if residual is None:
        return out
    return out + (residual if plan.space == 1 else repeat(residual, plan)[skip:])


def spread(out: Tensor, plan: Plan) -> Tensor:
    """Put the columns of a product (F X* Y* N') on their frames and places: (F' X' Y' N)."""
    if plan.space == 2:  # a phase's two rows are the place's own and its neighbour's on that side
        high, wide = out.shape[1] - 1, out.shape[2] - 1
        phases = rearrange(out, "f x y (p q n) -> p q f x y n", p=2, q=2)
        cut = [[phases[p, q, :, p : p + high, q : q + wide] for q in (0, 1)] for p in (0, 1)]
        return rearrange(torch.stack([torch.stack(row) for row in cut]), "p q f x y n -> f (x p) (y q) n")
    return rearrange(out, "f x y (t n) -> (f t) x y n", t=plan.time)


def repeat(x: Tensor, plan: Plan) -> Tensor:
    """Every channel of x (F X Y c) `repeats` times, spread over frames, rows and columns: (F' 2X 2Y N)."""
    many = x.repeat_interleave(plan.repeats, dim=3)
    return rearrange(many, "f x y (n t p q) -> (f t) (x p) (y q) n", t=plan.halves, p=2, q=2)
