"""The decoder's convolutions and its normalization, each for channels-last activations.

Shapes: F frames, X Y height and width, C channels in, N channels out, N' columns of the product, K = taps x C.
"""

from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

try:
    from stage1_encode.models import vae_norm_kernel
except ImportError:  # Triton is not installed
    vae_norm_kernel = None  # type: ignore[assignment]

NORM_EPS = 1e-24  # keeps zeros zero; diffusers clamps the vector length at 1e-12, the root of this


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of one convolution."""

    channels: int  # C
    outputs: int  # N
    depth: int = 3  # taps in time: the current frame and those before it
    side: int = 3  # taps in height and in width; 2 if space = 2
    time: int = 1  # output frames per input frame
    space: int = 1  # output rows per input row; 2 = nearest-neighbor upsampling and 3x3, folded into four 2x2 phases
    repeats: int = 1  # outputs (over channels, frames, rows, columns) that share one channel of the residual
    halves: int = 1  # output frames per frame of the residual


def fold_weight(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the matrix (N' K) of a convolution's weight (N' C t y x).

    Each of the four phases of a nearest-neighbor upsampled pixel sees only two input rows and two input columns, so the
    3x3 taps that fall on the same input pixel are summed. If time doubles, the first N outputs are the earlier frame.
    """
    if spec.space == 2:
        # row p of the output pair: tap 0 | taps 1+2 for p = 0, taps 0+1 | tap 2 for p = 1
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1.0, 1, 0], [0, 0, 1]]], device=weight.device)
        phases = torch.einsum("pay,qbx,nctyx->pqntabc", sums, sums, weight.float())
        return rearrange(phases, "p q n t a b c -> (p q n) (t a b c)").to(weight.dtype).contiguous()
    return rearrange(weight, "n c t y x -> n (t y x c)").contiguous()


def convolve(x: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec, *, residual: Tensor | None = None) -> Tensor:
    """Convolve x (F + depth - 1 X Y C) with a folded weight (N' K) and a bias (N, or 2N if time doubles).

    Returns (F' X' Y' N), contiguous. `residual` is added; it has the output's shape, or is smaller if space doubles.
    """
    filters = weight.unflatten(1, (spec.depth, spec.side, spec.side, spec.channels)).permute(0, 4, 1, 2, 3)
    video = x[None].permute(0, 4, 1, 2, 3)  # torch recognizes this order as channels-last and copies nothing
    padding = spec.side // 2
    full_bias = bias if spec.space == 1 else bias.repeat(spec.space**2)
    out = functional.conv3d(video, filters, full_bias, padding=(0, padding, padding)).permute(0, 2, 3, 4, 1)[0]
    if spec.space == 2:
        out = interleave_phases(out, spec.outputs)
        return out if residual is None else add_repeated(out, residual, spec)
    out = rearrange(out, "f x y (t n) -> (f t) x y n", t=spec.time)
    return (out if residual is None else out.add_(residual)).contiguous()


def interleave_phases(out: Tensor, outputs: int) -> Tensor:
    """Shuffle the four phases (F X+1 Y+1 4N) of an upsampling convolution into pixels (F 2X 2Y N)."""
    phases = rearrange(out, "f x y (p q n) -> p q f x y n", p=2, q=2)
    frames, height, width = len(out), out.shape[1] - 1, out.shape[2] - 1
    pixels = out.new_empty((frames, height, 2, width, 2, outputs))
    for p, q in product(range(2), range(2)):
        # with one pixel of padding, window i covers input rows i-1 and i: phase 1 starts one window later
        pixels[:, :, p, :, q] = phases[p, q, :, p : p + height, q : q + width]
    return pixels.view(frames, 2 * height, 2 * width, outputs)


def add_repeated(out: Tensor, residual: Tensor, spec: ConvSpec) -> Tensor:
    """Add to out (F' 2X 2Y N), in place, a residual (F X Y C) that is repeated over frames, rows and columns.

    The same as `DupUp3D` of diffusers, which repeats each channel `repeats` times and then reads the channels as
    (N halves 2 2). Here an axis of length 1 is broadcast instead, and nothing is copied.
    """
    assert 4 * spec.halves % spec.repeats == 0, spec
    distinct = 4 * spec.halves // spec.repeats  # residual channels per output channel: they vary over t, then p, then q
    t = min(distinct, spec.halves)
    p = min(distinct // t, 2)
    source = rearrange(residual, "f x y (n t p q) -> f t x p y q n", t=t, p=p, q=distinct // t // p)
    target = rearrange(out, "(f t) (x p) (y q) n -> f t x p y q n", f=len(residual), p=2, q=2)
    # the first frame of a video is not doubled: it takes the later of its residual's two halves
    target.add_(source[:, -target.shape[1] :])
    return out


def norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write SiLU(gamma * x / rms(x)) into `out`, with the fused kernel if one is available for x.

    x and out are (F X Y C), gamma is (C); the root mean square is over C.
    """
    # a program of the kernel holds whole rows, whose length must be a power of two
    if x.is_cuda and vae_norm_kernel is not None and len(gamma).bit_count() == 1:
        vae_norm_kernel.norm_silu_triton(x, gamma, out)
    else:
        norm_silu_torch(x, gamma, out)


def norm_silu_torch(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Do what `norm_silu` does, with PyTorch's own operations."""
    torch.ops.aten.silu.out(functional.rms_norm(x, gamma.shape, gamma, NORM_EPS), out=out)
