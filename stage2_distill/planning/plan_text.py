"""A plan in words: all of it for `plan`, eight lines at most for the start of a run. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType

from common.planning.units import format_bytes, format_count, format_hours, format_seconds
from common.video import FrameSize
from stage2_distill.config import DistillConfig
from stage2_distill.planning.duration import list_shapes
from stage2_distill.planning.run_plan import GIB, RunPlan

SMALL_NETWORK = 5e8  # parameters, below which starting a kernel takes longer than the kernel
PART_NAMES = {
    "student": "student, weights",
    "critic": "critic, weights",
    "teacher": "teacher, weights",
    "optimizer": "optimizer state of both",
    "average": "average (EMA)",
    "critic_average": "average of the critic",
    "gradients": "gradients",
    "activations": "activations kept",
    "not_at_once": "of the last two, never at once",
    "workspace": "workspace of attention and one block",
    "collectives": "collectives (gathered blocks)",
}


def format_plan(
    plan: RunPlan, config: DistillConfig, *, records: int, sizes: Mapping[FrameSize, float] = MappingProxyType({})
) -> list[str]:
    """The lines of the command `plan`; sizes: {size: share of the records}, empty for the configured one."""
    epochs = f"{plan.epochs:.3g}" if plan.epochs < 1000 else f"{plan.epochs:,.0f}"
    shapes, videos = count_shapes(config, sizes), describe_shapes(config, sizes)
    parts = {name: value for name, value in plan.memory.gpu_parts.items() if abs(value) >= 0.05 * GIB}
    verdict = "fits" if plan.fits else f"DOES NOT FIT; use {plan.remedy}"
    return [
        f"run: {format_count(plan.parameters)} parameters at {videos}, {len(config.timesteps)} steps, "
        f"{config.iterations} iterations of global batch {config.global_batch} "
        f"({epochs} times through {records} records)",
        *([f"shapes: {shapes}"] if shapes else []),
        f"on: {plan.gpus} x {plan.card}, {plan.card_gib:.1f} GiB each; speeds: {plan.source}; {plan.form} form, "
        f"attention {plan.kernel}",
        *(plan.calibration.format_lines() if plan.calibration else ()),
        "",
        f"memory per GPU: {plan.memory.gpu / GIB:.1f} GiB, {verdict}",
        *(f"  {PART_NAMES[name]:40}{value / GIB:7.1f} GiB" for name, value in parts.items()),
        f"host memory per GPU: {plan.memory.host / GIB:.1f} GiB",
        "",
        "other modes, per GPU:",
        *(f"  {mode.name:60}{mode.gib:7.1f} GiB  {'fits' if mode.fits else 'too large'}" for mode in plan.modes),
        "",
        *format_costs(plan, config),
    ]


def format_costs(plan: RunPlan, config: DistillConfig) -> list[str]:
    """The lines of time, money and disk."""
    faster = [f"  {format_seconds(item.iteration_seconds)} with {item.name}" for item in plan.faster]
    gpu_hours = f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 10 else f"{plan.gpu_hours:.2g}"
    money = "" if plan.cost is None else f", costs {plan.cost:,.0f}"
    spread = " (more than 8 GPUs: not measured; a slow network adds to it)" * (plan.gpus > 8)
    is_small = plan.parameters < SMALL_NETWORK and plan.calibration is None
    small = ["  a network as small as this one is slower: the speeds are those of large ones; --calibrate"] * is_small
    return [
        f"time: {format_seconds(plan.iteration_seconds)} per iteration, {format_hours(plan.hours)}, "
        f"{gpu_hours} GPU-hours{money}{spread}",
        *small,
        *faster,
        f"encode: {format_hours(plan.encode_hours)}, {format_bytes(plan.data_bytes)} of shards",
        f"checkpoint: {format_bytes(plan.memory.checkpoint)} every {config.checkpoint_every} iterations, training "
        f"waits {plan.pause_seconds:.1f} s; disk for the run {format_bytes(plan.run_bytes)}",
        f"a video by the student: about {plan.video_seconds:.1f} s on one GPU",
    ]


def describe_shapes(config: DistillConfig, sizes: Mapping[FrameSize, float]) -> str:
    """Sizes and lengths in words: 121 x 704 x 1280, or 81:0.3,121:0.7 frames of 704x1280 (60 %), 960x960 (40 %)."""
    own = config.spec.frame_size
    if len(sizes) < 2 and len(config.lengths) == 1:
        return f"{config.num_frames} x {own.height} x {own.width}"
    listed = (f"{size} ({share:.0%})" for size, share in sorted(sizes.items()))
    return f"{config.num_frames} frames of {', '.join(listed) if len(sizes) > 1 else own}"


def count_shapes(config: DistillConfig, sizes: Mapping[FrameSize, float]) -> str:
    """How many shapes a run has, how often it compiles, and for which it needs its memory; empty for one shape."""
    lengths, count = len(config.lengths), max(1, len(sizes))
    if lengths * count == 1:
        return ""
    largest = list_shapes(config, sizes)[0].config.spec
    compiled = f"blocks are compiled for at most {lengths * count} shapes, each once; " if config.compile else ""
    of_sizes, of_lengths = (
        f"{number} {word}{'s' * (number > 1)}" for number, word in ((count, "size"), (lengths, "length"))
    )
    return (
        f"{of_sizes} x {of_lengths}: {compiled}a micro-batch has one shape; memory is that of {largest.num_frames} x "
        f"{largest.height} x {largest.width}"
    )
