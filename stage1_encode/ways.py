"""What takes time in the decoder, and the fastest way to do it on a device.

Shapes: F frames, X Y height and width, C channels, N channels out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stage1_encode.conv import Plan, by_library

try:
    from stage1_encode import conv_kernel, norm_kernel
except ImportError:  # no Triton here
    conv_kernel = norm_kernel = None  # type: ignore[assignment]

TINY = 1e-24  # keeps a place of zeros zero; diffusers bounds its length from below by 1e-12


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
        (norm_kernel.normalise if ours else normalise)(x, gamma, out)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, plan: Plan, *, residual: Tensor | None, skip: int
    ) -> Tensor:
        """What `conv.by_library` does."""
        way = conv_kernel.convolve if self.convolutions and ours_is_faster(plan) else by_library
        return way(x, weight, bias, plan, residual=residual, skip=skip).contiguous()


def ours_is_faster(plan: Plan) -> bool:
    """Where our kernel beats cuDNN 9 on an H100 (benchmarks/results/decode-*), and its tiles fit.

    cuDNN leaves the phases of doubled rows and their residual to other passes, and is slow at 256 channels.
    """
    fits = plan.channels % 64 == 0 and plan.product % plan.columns == 0
    return fits and (plan.space == 2 or plan.time == 2 or plan.channels == plan.outputs == 256)


def ways_for(device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Ways:
    """The fastest ways on a device; our convolutions, which take some ten seconds to compile, only where asked for."""
    triton = device.type == "cuda" and norm_kernel is not None
    hopper = triton and torch.cuda.get_device_capability(device) == (9, 0)
    return Ways(norms=triton, convolutions=compiled and hopper and dtype == torch.bfloat16)
