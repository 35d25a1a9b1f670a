"""The compact optimizer's update as one GPU kernel per parameter: each byte is read and written once.

The arithmetic is that of torch's AdamW on a GPU, operation by operation, so that the master weights agree bit for bit.
Imported only if there is a GPU. Shapes: N elements, K blocks of 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # elements per program


@triton.jit
def _hashed_uniform(index, step):  # type: ignore[no-untyped-def]
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    mixed = low * 0x9E3779B1 + high * 0x85EBCA77 + step.to(tl.uint32) * 0xC2B2AE3D
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 16)) * 0x846CA68B
    return ((mixed ^ (mixed >> 16)) >> 8).to(tl.float32) / 16777216.0


@triton.jit
def _quantize_blocks(moment, uniforms, top_ptr, tops, mask):  # type: ignore[no-untyped-def]
    # quantized_moment.quantize_blocks: 16 levels per octave, code 255 is the block's top
    largest = tl.maximum(tl.max(moment, axis=1, keep_dims=True), 1.1754943508222875e-38)
    top = tl.floor(tl.log2(largest) * 16) + 1
    lower_code = tl.floor(tl.log2(tl.maximum(moment, 1e-45)) * 16 - top + 255)
    lower_code = tl.minimum(tl.maximum(lower_code, 1.0), 254.0)
    low, high = tl.exp2((top + lower_code - 255) / 16), tl.exp2((top + lower_code - 254) / 16)
    code = lower_code + ((moment - low) / (high - low) > uniforms).to(tl.float32)
    tl.store(top_ptr + tops, tl.reshape(top, tops.shape).to(tl.int16), mask=mask)
    return tl.where(moment > 0, code, 0.0).to(tl.uint8)


@triton.jit
def _update_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, low_ptr, grad_ptr, moment_ptr, top_ptr, coefficients_ptr, step_offset_ptr, count,
    QUANTIZED: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    factor = tl.load(coefficients_ptr + 7)
    count = tl.where(factor == factor, count, 0)  # NaN: nothing changes
    valid = index < count
    grad = tl.load(grad_ptr + index, mask=valid, other=0.0).to(tl.float32) * factor
    stored = tl.load(moment_ptr + index, mask=valid, other=0)
    moment = stored.to(tl.float32)
    tops = tl.program_id(0).to(tl.int64) * (CHUNK // 64) + tl.arange(0, CHUNK // 64)
    if QUANTIZED:
        top = tl.load(top_ptr + tops, mask=tops * 64 < count, other=0).to(tl.float32)
        value = tl.exp2((tl.reshape(moment, (CHUNK // 64, 64)) + top[:, None] - 255) / 16)
        moment = tl.where(moment > 0, tl.reshape(value, (CHUNK,)), 0.0)
    moment = tl.fma(
        tl.load(coefficients_ptr + 3), grad * grad, moment * tl.load(coefficients_ptr + 2)
    )  # as addcmul on a GPU
    if QUANTIZED:
        uniforms = _hashed_uniform(index + tl.load(step_offset_ptr + 1), tl.load(step_offset_ptr))
        shape: tl.constexpr = (CHUNK // 64, 64)
        code = _quantize_blocks(
            tl.reshape(moment, shape), tl.reshape(uniforms, shape), top_ptr, tops, tops * 64 < count
        )
        tl.store(moment_ptr + index, tl.reshape(code, (CHUNK,)), mask=valid)
    else:
        tl.store(moment_ptr + index, moment, mask=valid)
    high = tl.load(weight_ptr + index, mask=valid, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    bits = high * 65536 + tl.load(low_ptr + index, mask=valid, other=0).to(tl.int32)
    # on a GPU torch divides by a number by multiplying with its reciprocal, which it computes in float64
    denominator = tl.sqrt_rn(moment) * tl.load(coefficients_ptr + 6) + tl.load(coefficients_ptr + 5)
    master = bits.to(tl.float32, bitcast=True) * tl.load(coefficients_ptr)
    master = tl.fma(tl.load(coefficients_ptr + 1), tl.div_rn(grad, denominator), master)
    bits = master.to(tl.int32, bitcast=True)
    high = (bits + 32768) >> 16
    tl.store(weight_ptr + index, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=valid)
    tl.store(low_ptr + index, (bits - (high << 16)).to(tl.int16), mask=valid)


def update_parameter_fused(
    weight: Tensor, state: dict[str, Tensor], grad: Tensor, coefficients: Tensor, step_offset: Tensor
) -> None:
    """`compact_adamw.update_parameter` on contiguous vectors (N); coefficients: `StepCoefficients.pack` (8)."""
    moment = state["exp_avg_sq"]
    grid, top = (triton.cdiv(weight.numel(), CHUNK),), state.get("exp_avg_sq_top", moment)
    arguments = (weight, state["remainder"], grad, moment, top, coefficients, step_offset, weight.numel())
    if weight.numel():
        # without fp_fusion products and sums are rounded separately, as they are where torch's kernels end
        _update_kernel[grid](*arguments, QUANTIZED=moment.dtype == torch.uint8, CHUNK=CHUNK, enable_fp_fusion=False)
