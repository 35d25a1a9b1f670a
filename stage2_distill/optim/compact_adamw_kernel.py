"""The compact optimizer's update as one GPU kernel a parameter: each byte is read and written once.

The arithmetic is that of torch's AdamW on a GPU, operation by operation, so that the masters agree to the bit.
Only imported where there is a GPU. Shapes: N elements, K blocks of 64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # elements of a program
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # of the second moment


@triton.jit
def _chance(place, step):  # type: ignore[no-untyped-def]
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    mixed = low * 0x9E3779B1 + high * 0x85EBCA77 + step.to(tl.uint32) * 0xC2B2AE3D
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 16)) * 0x846CA68B
    return ((mixed ^ (mixed >> 16)) >> 8).to(tl.float32) / 16777216.0


@triton.jit
def _encode(moment, chances, top_at, tops, inside):  # type: ignore[no-untyped-def]
    # moment.encode: 16 levels an octave, code 255 is the block's top
    largest = tl.maximum(tl.max(moment, axis=1, keep_dims=True), 1.1754943508222875e-38)
    top = tl.floor(tl.log2(largest) * 16) + 1
    place = tl.floor(tl.log2(tl.maximum(moment, 1e-45)) * 16 - top + 255)
    place = tl.minimum(tl.maximum(place, 1.0), 254.0)
    low, high = tl.exp2((top + place - 255) / 16), tl.exp2((top + place - 254) / 16)
    code = place + ((moment - low) / (high - low) > chances).to(tl.float32)
    tl.store(top_at + tops, tl.reshape(top, tops.shape).to(tl.int16), mask=inside)
    return tl.where(moment > 0, code, 0.0).to(tl.uint8)


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    weight_at, low_at, grad_at, moment_at, top_at, rates_at, place_at, count, KIND: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    number = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    factor = tl.load(rates_at + 7)
    count = tl.where(factor == factor, count, 0)  # not a number: nothing changes
    inside = number < count
    grad = tl.load(grad_at + number, mask=inside, other=0.0).to(tl.float32) * factor
    kept = tl.load(moment_at + number, mask=inside, other=0)
    moment = kept.to(tl.float32)
    tops = tl.program_id(0).to(tl.int64) * (CHUNK // 64) + tl.arange(0, CHUNK // 64)
    if KIND == 2:
        top = tl.load(top_at + tops, mask=tops * 64 < count, other=0).to(tl.float32)
        value = tl.exp2((tl.reshape(moment, (CHUNK // 64, 64)) + top[:, None] - 255) / 16)
        moment = tl.where(moment > 0, tl.reshape(value, (CHUNK,)), 0.0)
    moment = tl.fma(tl.load(rates_at + 3), grad * grad, moment * tl.load(rates_at + 2))  # as addcmul on a GPU
    if KIND == 0:
        tl.store(moment_at + number, moment, mask=inside)
    else:
        chances = _chance(number + tl.load(place_at + 1), tl.load(place_at))
        if KIND == 1:
            bits = moment.to(tl.int32, bitcast=True) + (chances * 65536.0).to(tl.int32)
            tl.store(moment_at + number, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        else:
            shape: tl.constexpr = (CHUNK // 64, 64)
            code = _encode(tl.reshape(moment, shape), tl.reshape(chances, shape), top_at, tops, tops * 64 < count)
            tl.store(moment_at + number, tl.reshape(code, (CHUNK,)), mask=inside)
    high = tl.load(weight_at + number, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    bits = high * 65536 + tl.load(low_at + number, mask=inside, other=0).to(tl.int32)
    # torch divides by a number on a GPU through its reciprocal, which it takes in float64
    denominator = tl.sqrt_rn(moment) * tl.load(rates_at + 6) + tl.load(rates_at + 5)
    master = bits.to(tl.float32, bitcast=True) * tl.load(rates_at)
    master = tl.fma(tl.load(rates_at + 1), tl.div_rn(grad, denominator), master)
    bits = master.to(tl.int32, bitcast=True)
    high = (bits + 32768) >> 16
    tl.store(weight_at + number, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(low_at + number, (bits - (high << 16)).to(tl.int16), mask=inside)


def advance_fused(weight: Tensor, state: dict[str, Tensor], grad: Tensor, rates: Tensor, place: Tensor) -> None:
    """compact.advance, all vectors (N) contiguous; products and sums stay apart where torch's kernels end."""
    moment = state["exp_avg_sq"]
    grid, top = (triton.cdiv(weight.numel(), CHUNK),), state.get("exp_avg_sq_top", moment)
    numbers = (weight, state["remainder"], grad, moment, top, rates, place, weight.numel())
    if weight.numel():
        _advance[grid](*numbers, KIND=KINDS[moment.dtype], CHUNK=CHUNK, enable_fp_fusion=False)
