"""The decoder's kernel against PyTorch's operations, on a GPU; skipped on machines without one."""

import pytest
import torch

from stage1_encode.models import vae_ops
from stage1_encode.models.vae_ops import norm_silu_torch


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("channels", [16, 256, 1024])
def test_norm_in_one_pass(channels: int) -> None:
    x, gamma = torch.randn(2, 5, 7, channels, device="cuda"), torch.randn(channels, device="cuda")
    x[0, 0, 0] = 0
    exact, result, half = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    norm_silu_torch(x, gamma, exact)
    vae_ops.norm_silu(x, gamma, result)
    vae_ops.norm_silu(x.bfloat16(), gamma.bfloat16(), half)
    assert not torch.equal(result, exact), "the kernel rounds differently"
    assert relative_error(result, exact) < 1e-6
    assert relative_error(half, exact) < 5e-3
