"""Layers in 8 bits against the same arithmetic in float64, and against the layers that they stand for."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.device import build_network, inputs, make_case, randomize_weights
from stage2_distill.low_precision import fp8_linear
from stage2_distill.low_precision.fp8_linear import (
    StoredFp8Linear,
    block_layers,
    store_in_fp8,
)
from stage2_distill.low_precision.quantized_rows import multiply_rows, quantize_gelu, quantize_rows
from stage2_distill.model.layers import ExecutionPlan, block_forward
from stage2_distill.model.transformer import WanTransformer, convert_transformer
from stage2_distill.model.wan import cast_parameters

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 16}
ARGUMENTS = inputs(make_case(True, half=True), batch=2) | {"return_dict": False}


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def network(plan: ExecutionPlan | None = None) -> WanTransformer:
    """A bf16 network whose blocks do something; always the same."""
    net = cast_parameters(convert_transformer(build_network(SIZES), plan), torch.bfloat16).eval()
    randomize_weights(net.named_parameters(), torch.device("cpu"))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.dim() > 1:
                weight.mul_(16)
            elif name.endswith("bias"):
                weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()))
    return net


@torch.no_grad()
def velocity(net: nn.Module) -> Tensor:
    result: Tensor = net(**ARGUMENTS)[0]
    return result


class EmulatedLinear(nn.Module):
    """What a layer in 8 bits computes, in float64: e4m3 has 3 bits after the first and no exponent below -6."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(layer.weight), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return (rounded(x) @ self.weight.t() + self.bias).bfloat16()


def rounded(x: Tensor) -> Tensor:
    """Rows of x rounded to multiples of a float8 number's last place, after scaling the row's peak to 448."""
    scale = x.detach().double().abs().amax(-1, keepdim=True) / 448
    x = x.detach().double() / scale
    step = 2.0 ** (x.abs().log2().floor().clamp_min(-6) - 3)
    return (x / step).round() * step * scale


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 512), torch.randn(96, 512)
    product = multiply_rows(quantize_rows(x), quantize_rows(weight), None)
    assert product.shape == (2, 40, 96)
    assert relative_error(product, rounded(x) @ rounded(weight).t()) < 3e-3  # rounding to bf16
    assert relative_error(product, x.double() @ weight.double().t()) == pytest.approx(0.0375, rel=0.03)


def test_a_row_does_not_depend_on_the_others() -> None:
    """So samples of a batch, and tokens of another rank, do not change a result."""
    x = torch.randn(6, 32) * torch.tensor([1e-3, 1, 1e3, 1, 0, 5.0])[:, None]
    together, alone = quantize_rows(x.bfloat16()), quantize_rows(x[1:2].bfloat16())
    assert torch.equal(together.values[1:2].float(), alone.values.float())
    assert torch.equal(together.scale[1:2], alone.scale)
    assert together.values.float().abs().amax(1).tolist() == [448, 448, 448, 448, 0, 448]


def test_numbers_that_are_not_finite_stay_so() -> None:
    x = torch.ones(3, 16, dtype=torch.bfloat16)
    x[0, 3], x[1, 3] = float("nan"), float("inf")
    product = multiply_rows(quantize_rows(x), quantize_rows(torch.ones(16, 16, dtype=torch.bfloat16)), None)
    assert product.isfinite().all(dim=1).tolist() == [False, False, True]


def test_the_activation_is_part_of_the_rounding() -> None:
    x = torch.randn(20, 64).bfloat16()
    found = quantize_gelu(x)
    exact = nn.functional.gelu(x.double(), approximate="tanh")
    assert relative_error(found.values.double() * found.scale, rounded(exact)) < 2e-2


def test_stored_network_is_the_emulated_one() -> None:
    plain, stored, emulated = network(), network(), network()
    store_in_fp8(stored)
    for block, name, layer in block_layers(emulated):
        block.set_submodule(name, EmulatedLinear(layer))
    exact = velocity(plain)
    # Each bf16 rounding may move a number across a border between float8 numbers, so the two are not closer.
    assert relative_error(velocity(stored), velocity(emulated)) < 0.025 < 0.03 < relative_error(velocity(stored), exact)
    x = torch.randn(7, 64).bfloat16()
    down = stored.blocks[1].ffn.net[2], emulated.blocks[1].ffn.net[2]
    assert relative_error(down[0](x), down[1](x)) < 1e-2  # some bf16 numbers lie on such a border
    layers = {name for name, module in stored.named_modules() if isinstance(module, StoredFp8Linear)}
    names = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert layers == {f"blocks.{n}.{name}" for n in (0, 1) for name in [*names, "ffn.net.0.proj", "ffn.net.2"]}
    weights, rounded_weights = dict(plain.named_parameters()), dict(stored.named_parameters())
    for name, weight in weights.items():
        if name.removesuffix(".weight") in layers:
            assert rounded_weights[name].nbytes == weight.nbytes / 2
        else:
            assert torch.equal(rounded_weights[name], weight), name


def test_layers_of_one_input_round_it_once() -> None:
    net = network()
    store_in_fp8(net)
    with mock.patch.object(fp8_linear, "quantize_rows", wraps=fp8_linear.quantize_rows) as quantize:
        velocity(net)
    # self-attention and its output, queries and keys of the text's attention and its output, feed-forward (and gelu)
    assert quantize.call_count == 2 * 6


def test_a_block_in_8_bits_is_one_graph() -> None:
    net = network()
    store_in_fp8(net)
    (block, _), plan = net.blocks, ExecutionPlan()
    x, text, temb = torch.randn(1, 8, 32), torch.randn(1, 4, 32), torch.randn(1, 2, 6, 32)
    rope = torch.randn(1, 8, 1, 8), torch.randn(1, 8, 1, 8)
    compiled = torch.compile(partial(block_forward, plan=plan), backend="eager", fullgraph=True)
    arguments = block, x.bfloat16(), text.bfloat16(), temb, rope, 4
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), block_forward(*arguments, plan=plan))
    torch._dynamo.reset()
