"""Products in 8 bits on a GPU against those of the CPU; skipped on a machine without a GPU."""

import pytest
import torch
from torch.nn.functional import gelu

from stage2_distill.low_precision.fp8_support import check_fp8_device
from stage2_distill.low_precision.quantized_rows import multiply_rows, quantize_gelu, quantize_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.cpu().double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("width", [192, 3072, 14336])
def test_one_kernel_rounds_as_the_plain_form(width: int) -> None:
    x = torch.randn(2, 50, width).bfloat16()
    x[0, 0] = 0
    for on_gpu, exact in (
        (quantize_rows(x.cuda()), quantize_rows(x)),
        (quantize_gelu(x.cuda()), quantize_rows(gelu(x.float(), approximate="tanh"))),
    ):
        expected = exact.values.float() * exact.scale
        assert relative_error(on_gpu.values.float() * on_gpu.scale, expected) < 1e-2  # numbers on a border
        assert relative_error(on_gpu.scale, exact.scale) < 1e-6


@pytest.mark.parametrize("rows", [7, 512])
def test_product(rows: int) -> None:
    check_fp8_device(torch.device("cuda"))
    x, weight, bias = torch.randn(2, rows, 3072), torch.randn(1024, 3072), torch.randn(1024).bfloat16()
    on_gpu = multiply_rows(quantize_rows(x.cuda()), quantize_rows(weight.cuda()), bias.cuda())
    # not by the CPU's own product in 8 bits, which torch 2.11 has not for scales of rows
    exact_x, exact_weight = (rows.values.double() * rows.scale.double() for rows in map(quantize_rows, (x, weight)))
    assert relative_error(on_gpu, exact_x @ exact_weight.mT + bias.double()) < 6e-3


def test_compiled_rounding() -> None:
    x = torch.randn(50, 3072, device="cuda", dtype=torch.bfloat16)
    plain, compiled = quantize_rows(x), torch.compile(quantize_rows, dynamic=False)(x)
    assert relative_error(compiled.values.float() * compiled.scale, (plain.values.float() * plain.scale).cpu()) < 1e-2
    torch._dynamo.reset()
