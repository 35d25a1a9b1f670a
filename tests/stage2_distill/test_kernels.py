"""The kernels for GPUs against the plain forms, on a GPU; `make test` on a machine without one skips them."""

import pytest
import torch

from stage2_distill.network import Plan, adopt, rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(("width", "heads"), [(3072, 24), (24, 2)])
def test_norm_and_rotation(width: int, heads: int) -> None:
    from stage2_distill.kernels import norm_rotate

    x, weight = torch.randn(2, 50, width, device="cuda"), torch.randn(width, device="cuda")
    cos, sin = torch.randn(2, 1, 50, 1, width // heads // 2, device="cuda")
    normed = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    exact = rotate(normed.unflatten(-1, (heads, -1)), (cos.double(), sin.double())).flatten(2)
    assert off(norm_rotate(x, weight, cos, sin, 1e-6), exact) < 1e-6
    assert off(norm_rotate(x.bfloat16(), weight, cos, sin, 1e-6), exact) < 4e-3


def test_gelu_in_the_product() -> None:
    from stage2_distill.kernels import linear_gelu

    x, w, b = (torch.randn(*shape, device="cuda") for shape in ((2, 50, 64), (256, 64), (256,)))
    exact = torch.nn.functional.gelu(x.double() @ w.double().t() + b.double(), approximate="tanh")
    assert off(linear_gelu(x.bfloat16(), w.bfloat16(), b.bfloat16()), exact) < 8e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_without_gradient_is_the_one_with(compiled: bool) -> None:
    from benchmarks.device import Case, inputs, random_network
    from common.video import VideoSpec

    fields = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024, "text_dim": 64}
    chosen = Case(VideoSpec(9, 64, 64), torch.device("cuda"), torch.bfloat16, fields)
    net, given = adopt(random_network(chosen), Plan(compiled=compiled)), inputs(chosen)
    with torch.no_grad():
        (without,) = net(**given, return_dict=False)
    (having,) = net(**given, return_dict=False)
    assert off(without, having) < 1e-2
