"""The decoder's convolutions and normalisation, and the fastest implementation of them on a device.

Shapes: F frames, X Y height and width, C channels in, N channels out, N' columns of the product, K = taps x C.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

try:
    from stage1_encode.models import vae_conv_kernel, vae_norm_kernel
except ImportError:  # no Triton here
    vae_conv_kernel = vae_norm_kernel = None  # type: ignore[assignment]

TINY = 1e-24  # keeps a place of zeros zero; diffusers bounds its length from below by 1e-12


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
    out = functional.conv3d(video, filters, whole, padding=(0, edge, edge)).permute(0, 2, 3, 4, 1)[0]
    if plan.space == 2:
        return grow(out, plan, residual, skip)
    out = rearrange(out, "f x y (t n) -> (f t) x y n", t=plan.time)
    return out if residual is None else out.add_(residual)


def grow(out: Tensor, plan: Plan, residual: Tensor | None, skip: int) -> Tensor:
    """Put the four phases of a product (F X+1 Y+1 4N) on their places, (F 2X 2Y N), and add the residual.

    A phase's two rows are the place's own and its neighbour's on that side. The residual's channels are repeated over
    the outputs, then over frames, rows and columns, so that one output, frame and phase sees every few-th of them.
    """
    frames, high, wide = out.shape[0], out.shape[1] - 1, out.shape[2] - 1
    made = out.new_empty((frames, high, 2, wide, 2, plan.outputs))
    for phase in range(4):
        p, q = phase // 2, phase % 2
        columns = slice(phase * plan.outputs, (phase + 1) * plan.outputs)
        made[:, :, p, :, q] = out[:, p : p + high, q : q + wide, columns]
        for half in range(plan.halves if residual is not None else 0):
            assert residual is not None and 4 * plan.halves % plan.repeats == 0, plan
            first = (half - skip) % plan.halves
            given = residual[
                (first + skip) // plan.halves :,
                ...,
                (4 * half + phase) // plan.repeats :: 4 * plan.halves // plan.repeats,
            ]
            target = made[first :: plan.halves, :, p, :, q]
            target.add_(given[: len(target)])
    return made.view(frames, 2 * high, 2 * wide, plan.outputs)


def normalise(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """out (F X Y C) = SiLU of x (F X Y C) at unit root mean square over C, times gamma (C)."""
    torch.ops.aten.silu.out(functional.rms_norm(x, gamma.shape, gamma, TINY), out=out)


@dataclass(frozen=True)
class Ways:
    """How a device does the two things that take time: by PyTorch's own operations, or by kernels of ours."""

    norms: bool = False  # ours: for GPUs with Triton
    convolutions: bool = False  # ours, where they are faster: for Hopper GPUs in bf16

    def norm(self, x: Tensor, gamma: Tensor, out: Tensor) -> None:
        """Normalise into `out`."""
        ours = self.norms and len(gamma).bit_count() == 1  # a program of the kernel holds whole rows, a power of two
        (vae_norm_kernel.normalise if ours else normalise)(x, gamma, out)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, *, residual: Tensor | None, skip: int
    ) -> Tensor:
        """What `by_library` does."""
        way = vae_conv_kernel.convolve if self.convolutions and ours_is_faster(plan) else by_library
        return way(x, weight, bias, plan, residual=residual, skip=skip).contiguous()


def ours_is_faster(plan: Plan) -> bool:
    """Where our kernel beats cuDNN 9 on an H100 (benchmarks/results/decode-*), and its tiles fit.

    cuDNN leaves the phases of doubled rows and their residual to other passes, and is slow at 256 channels.
    """
    fits = plan.channels % 64 == 0 and plan.product % plan.columns == 0
    return fits and (plan.space == 2 or plan.time == 2 or plan.channels == plan.outputs == 256)


def ways_for(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Ways:
    """The fastest ways on a device; our convolutions, which take some ten seconds to compile, only where asked for."""
    triton = device.type == "cuda" and vae_norm_kernel is not None
    hopper = triton and torch.cuda.get_device_capability(device) == (9, 0)
    return Ways(norms=triton, convolutions=compiled and hopper and dtype == torch.bfloat16)
