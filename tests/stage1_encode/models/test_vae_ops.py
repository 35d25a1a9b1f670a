"""The decoder's kernels against PyTorch's operations, on a GPU; `make test` on a machine without one skips them."""

import pytest
import torch

from stage1_encode.models import vae_ops
from stage1_encode.models.vae_ops import ConvSpec, convolve_torch, fold_weight, is_kernel_faster, norm_silu_torch

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
PLANS = [
    ConvSpec(256, 256),
    ConvSpec(256, 256, side=1, time=2),
    ConvSpec(512, 256, depth=1, side=2, space=2, repeats=2),
]


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("channels", [16, 256, 1024])
def test_norm_in_one_pass(channels: int) -> None:
    x, gamma = torch.randn(2, 5, 7, channels, device="cuda"), torch.randn(channels, device="cuda")
    x[0, 0, 0] = 0
    exact, found, half = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    norm_silu_torch(x, gamma, exact)
    vae_ops.vae_norm_kernel.normalise(x, gamma, found)
    vae_ops.vae_norm_kernel.normalise(x.bfloat16(), gamma.bfloat16(), half)
    assert off(found, exact) < 1e-6
    assert off(half, exact) < 5e-3


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_convolutions_on_a_picture_that_no_tile_divides(plan: ConvSpec) -> None:
    assert is_kernel_faster(plan)
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(3 + plan.depth - 1, 21, 37, plan.channels, **draw)
    side = 3 if plan.space == 2 else plan.side
    weight = fold_weight(
        torch.randn(plan.outputs * plan.time, plan.channels, plan.depth, side, side, **draw) / 64, plan
    )
    bias = torch.randn(plan.outputs * plan.time, **draw)
    residual = torch.randn_like(x) if plan.repeats else None
    found = vae_ops.vae_conv_kernel.convolve(x, weight, bias, plan, residual=residual)
    exact = None if residual is None else residual.float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = convolve_torch(x.float(), weight.float(), bias.float(), plan, residual=exact)
    assert off(found, wanted) < 5e-3
    assert torch.equal(found, vae_ops.vae_conv_kernel.convolve(x, weight, bias, plan, residual=residual))
