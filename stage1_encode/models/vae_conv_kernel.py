"""Causal convolutions of the VAE on Hopper's matrix units: an implicit matrix product in Gluon.

Two warpgroups multiply tiles of 64 places by `columns` outputs while one warp fetches the next tiles with the tensor
copy engine, which also gives the zeros beyond the picture's edge: no padded or unfolded input is ever written.
Shapes: F frames, X Y height and width, C channels in, N channels out, K = taps x C.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILE_PLACES = 64  # of a warpgroup's tile, and channels of a step


@gluon.jit
def tile_position(number, size, plan: gl.constexpr):
    """Frame, first row and first column of a warpgroup's tile."""
    width: gl.constexpr = 64 // plan.rows
    across = gl.cdiv(size[2], width)
    frame = gl.cdiv(size[1], plan.rows) * across
    rest = number % frame
    return number // frame, rest // across * plan.rows, rest % across * width


@gluon.jit
def tile_count(size, plan: gl.constexpr):
    """Number of tiles of both warpgroups."""
    frame = gl.cdiv(size[1], plan.rows) * gl.cdiv(size[2], 64 // plan.rows)
    return gl.cdiv(size[0] * frame, 2) * (plan.outputs * plan.time * plan.space * plan.space // plan.columns)


@gluon.jit
def fetch_tiles(x, weight, memory, size, plan: gl.constexpr):
    """Fill the steps of every tile of this block, one after the other."""
    places, weights, full, empty = memory
    area: gl.constexpr = plan.side * plan.side
    blocks: gl.constexpr = plan.channels // 64
    steps: gl.constexpr = plan.depth * plan.side * plan.side * blocks
    groups: gl.constexpr = plan.outputs * plan.time * plan.space * plan.space // plan.columns
    step = 0
    for tile in range(gl.program_id(0), tile_count(size, plan), gl.num_programs(0)):
        column = tile % groups * plan.columns
        up = plan.side // 2
        left = plan.side // 2
        if plan.space == 2:  # a phase sees itself and the neighbour on its side
            up = 1 - column // plan.outputs // 2
            left = 1 - column // plan.outputs % 2
        for k in range(steps):
            slot = step % 4
            mbarrier.wait(empty.index(slot), (step // 4 & 1) ^ 1)
            mbarrier.expect(full.index(slot), (2 * 64 + plan.columns) * 64 * 2)
            tap = k // blocks
            for group in gl.static_range(2):
                t, y, x_ = tile_position(tile // groups * 2 + group, size, plan)
                where = [
                    t + tap // area,
                    y + tap // plan.side % plan.side - up,
                    x_ + tap % plan.side - left,
                    k % blocks * 64,
                ]
                tma.async_copy_global_to_shared(x, where, full.index(slot), places.index(slot * 2 + group))
            tma.async_copy_global_to_shared(weight, [column, k * 64], full.index(slot), weights.index(slot))
            step += 1


@gluon.jit
def multiply_tiles(out, memory, size, plan: gl.constexpr, group: gl.constexpr):
    """Sum the products of this warpgroup's tiles, add bias and residual, and store."""
    places, weights, full, empty = memory
    target, bias, residual = out
    columns: gl.constexpr = plan.columns
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    steps: gl.constexpr = plan.depth * plan.side * plan.side * (plan.channels // 64)
    groups: gl.constexpr = plan.outputs * plan.time * plan.space * plan.space // plan.columns
    step = 0
    for tile in range(gl.program_id(0), tile_count(size, plan), gl.num_programs(0)):
        total = gl.zeros((64, columns), gl.float32, layout)
        for k in range(steps):
            slot = step % 4
            mbarrier.wait(full.index(slot), step // 4 & 1)
            left = places.index(slot * 2 + group).reshape([64, 64])
            total = warpgroup_mma(left, weights.index(slot).permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            if k > 0:
                mbarrier.arrive(empty.index((step + 3) % 4), count=1)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((step + 3) % 4), count=1)
        column = tile % groups * plan.columns
        t, y, x = tile_position(tile // groups * 2 + group, size, plan)
        store_tile(total, target, bias, residual, (t, y, x, column), size, plan)


@gluon.jit
def store_tile(total, target, bias, residual, start, size, plan: gl.constexpr):
    """Add bias and residual to a tile and write it to its places of the output."""
    layout: gl.constexpr = total.type.layout
    t, y, x, column = start
    width: gl.constexpr = 64 // plan.rows
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    y = y + rows // width
    x = x + rows % width
    inside = (y < size[1]) & (x < size[2]) & (t < size[0])
    phase = column // plan.outputs
    first = column % plan.outputs
    columns = first + gl.arange(0, plan.columns, gl.SliceLayout(0, layout))
    if plan.time == 2:
        t = 2 * t + phase
    if plan.space == 2:
        y_out = 2 * y + phase // 2
        x_out = 2 * x + phase % 2
    else:
        y_out = y
        x_out = x
    place = ((t * (size[1] * plan.space) + y_out) * (size[2] * plan.space) + x_out).to(gl.int64)
    own = columns + (phase * plan.outputs if plan.time == 2 else 0)
    total += gl.load(bias + own)[None, :].to(gl.float32)
    if plan.repeats > 0:
        if plan.space == 1:
            total += gl.load(residual + place[:, None] * plan.outputs + columns[None, :], inside[:, None], 0.0)
        else:
            t = t + size[3]
            source = (((t // plan.halves) * size[1] + y) * size[2] + x).to(gl.int64)
            channels: gl.constexpr = plan.outputs * plan.halves * 4 // plan.repeats
            which = ((columns * plan.halves + t % plan.halves) * 4 + phase) // plan.repeats
            total += gl.load(residual + source[:, None] * channels + which[None, :], inside[:, None], 0.0)
    gl.store(target + place[:, None] * plan.outputs + columns[None, :], total.to(gl.bfloat16), inside[:, None])


@gluon.jit
def conv_kernel_entry(x, weight, bias, residual, target, size, plan: gl.constexpr):
    """One block: two warpgroups that multiply, one warp that fetches."""
    places = gl.allocate_shared_memory(gl.bfloat16, [8, 1, plan.rows, 64 // plan.rows, 64], x.layout)
    weights = gl.allocate_shared_memory(gl.bfloat16, [4, plan.columns, 64], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(4):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    memory = (places, weights, full, empty)
    out = (target, bias, residual)
    gl.warp_specialize(
        [
            (multiply_tiles, (out, memory, size, plan, 0)),
            (multiply_tiles, (out, memory, size, plan, 1)),
            (fetch_tiles, (x, weight, memory, size, plan)),
        ],
        [4, 1],
        [232, 40],
    )


def convolve_hopper(
    x: Tensor, weight: Tensor, bias: Tensor, plan, *, residual: Tensor | None = None, skip: int = 0
) -> Tensor:
    """What `vae_ops.convolve_torch` does, in bf16."""
    frames, height, width = x.shape[0] - plan.depth + 1, x.shape[1], x.shape[2]
    shape = (frames * plan.time, height * plan.space, width * plan.space, plan.outputs)
    out = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    box, block = [1, plan.rows, TILE_PLACES // plan.rows, TILE_PLACES], [plan.columns, TILE_PLACES]
    source = TensorDescriptor.from_tensor(x, box, gl.NVMMASharedLayout(128, 16, rank=4))
    factors = TensorDescriptor.from_tensor(weight, block, gl.NVMMASharedLayout(128, 16, rank=2))
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    size = (frames, height, width, skip)
    conv_kernel_entry[(blocks,)](
        source, factors, bias, bias if residual is None else residual, out, size, plan, num_warps=4
    )
    return out
