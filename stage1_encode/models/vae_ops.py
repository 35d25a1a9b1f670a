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

NORM_EPS = 1e-24  # keeps a place of zeros zero; diffusers bounds its length from below by 1e-12


@dataclass(frozen=True)
class ConvSpec:
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


def fold_weight(weight: Tensor, spec: ConvSpec) -> Tensor:
    """The weight (N' K) of a plan from a convolution's weight (N' C t y x).

    Nearest neighbours and then 3x3 see, from each of the four phases of a place, two rows and two columns: taps that
    fall on the same place are added up. Where time doubles, the outputs are those of the first frame, then the second.
    """
    if spec.space == 2:
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1.0, 1, 0], [0, 0, 1]]], device=weight.device)
        phases = torch.einsum("pay,qbx,nctyx->pqntabc", sums, sums, weight.float())
        return rearrange(phases, "p q n t a b c -> (p q n) (t a b c)").to(weight.dtype).contiguous()
    return rearrange(weight, "n c t y x -> n (t y x c)").contiguous()


def convolve_torch(
    x: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec, *, residual: Tensor | None = None, skip: int = 0
) -> Tensor:
    """Convolve x (F + depth - 1 X Y C) with a folded weight (N' K) and a bias (N, doubled with time); (F' X' Y' N).

    `residual` is added: of the shape of the output, or where space doubles a smaller one whose first `skip` output
    frames are left out.
    """
    filters = weight.unflatten(1, (spec.depth, spec.side, spec.side, spec.channels)).permute(0, 4, 1, 2, 3)
    video = x[None].permute(0, 4, 1, 2, 3)  # in this order torch sees that the channels lie last, and copies nothing
    padding = spec.side // 2
    full_bias = bias if spec.space == 1 else bias.repeat(spec.space**2)
    out = functional.conv3d(video, filters, full_bias, padding=(0, padding, padding)).permute(0, 2, 3, 4, 1)[0]
    if spec.space == 2:
        return interleave_phases(out, spec, residual, skip)
    out = rearrange(out, "f x y (t n) -> (f t) x y n", t=spec.time)
    return out if residual is None else out.add_(residual)


def interleave_phases(out: Tensor, spec: ConvSpec, residual: Tensor | None, skip: int) -> Tensor:
    """Put the four phases of a product (F X+1 Y+1 4N) on their places, (F 2X 2Y N), and add the residual.

    A phase's two rows are the place's own and its neighbour's on that side. The residual's channels are repeated over
    the outputs, then over frames, rows and columns, so that one output, frame and phase sees every few-th of them.
    """
    frames, height, width = out.shape[0], out.shape[1] - 1, out.shape[2] - 1
    output = out.new_empty((frames, height, 2, width, 2, spec.outputs))
    for phase in range(4):
        p, q = phase // 2, phase % 2
        columns = slice(phase * spec.outputs, (phase + 1) * spec.outputs)
        output[:, :, p, :, q] = out[:, p : p + height, q : q + width, columns]
        for half in range(spec.halves if residual is not None else 0):
            assert residual is not None and 4 * spec.halves % spec.repeats == 0, spec
            first = (half - skip) % spec.halves
            source = residual[
                (first + skip) // spec.halves :,
                ...,
                (4 * half + phase) // spec.repeats :: 4 * spec.halves // spec.repeats,
            ]
            target = output[first :: spec.halves, :, p, :, q]
            target.add_(source[: len(target)])
    return output.view(frames, 2 * height, 2 * width, spec.outputs)


def norm_silu_torch(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """out (F X Y C) = SiLU of x (F X Y C) at unit root mean square over C, times gamma (C)."""
    torch.ops.aten.silu.out(functional.rms_norm(x, gamma.shape, gamma, NORM_EPS), out=out)


@dataclass(frozen=True)
class KernelBackend:
    """How a device does the two things that take time: by PyTorch's own operations, or by kernels of ours."""

    triton_norms: bool = False  # ours: for GPUs with Triton
    convolutions: bool = False  # ours, where they are faster: for Hopper GPUs in bf16

    def norm_silu(self, x: Tensor, gamma: Tensor, out: Tensor) -> None:
        """Normalise into `out`."""
        use_kernel = (
            self.triton_norms and len(gamma).bit_count() == 1
        )  # a program of the kernel holds whole rows, a power of two
        (vae_norm_kernel.norm_silu_triton if use_kernel else norm_silu_torch)(x, gamma, out)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec, *, residual: Tensor | None, skip: int
    ) -> Tensor:
        """What `convolve_torch` does."""
        convolve = vae_conv_kernel.convolve_hopper if self.convolutions and is_kernel_faster(spec) else convolve_torch
        return convolve(x, weight, bias, spec, residual=residual, skip=skip).contiguous()


def is_kernel_faster(spec: ConvSpec) -> bool:
    """Where our kernel beats cuDNN 9 on an H100 (benchmarks/results/decode-*), and its tiles fit.

    cuDNN leaves the phases of doubled rows and their residual to other passes, and is slow at 256 channels.
    """
    fits = spec.channels % 64 == 0 and spec.product % spec.columns == 0
    return fits and (spec.space == 2 or spec.time == 2 or spec.channels == spec.outputs == 256)


def select_backend(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> KernelBackend:
    """The fastest ways on a device; our convolutions, which take some ten seconds to compile, only where asked for."""
    triton = device.type == "cuda" and vae_norm_kernel is not None
    hopper = triton and torch.cuda.get_device_capability(device) == (9, 0)
    return KernelBackend(triton_norms=triton, convolutions=compiled and hopper and dtype == torch.bfloat16)
