"""A plan in words: all of it for `plan`, eight lines at most for the start of a run. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType

from common.planning.units import format_hours
from common.video import FrameSize
from stage2_distill.config import DistillConfig
from stage2_distill.planning.duration import list_shapes
from stage2_distill.planning.run_plan import GIB, RunPlan

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
    gigabytes = plan.parameters / 1e9
    shapes, videos = count_shapes(config, sizes), describe_shapes(config, sizes)
    verdict = "fits" if plan.fits else f"DOES NOT FIT; use {plan.remedy}"
    return [
        f"run: {gigabytes:.2f} G parameters at {videos}, {len(config.timesteps)} steps, {config.iterations} iterations "
        f"of global batch {config.global_batch} ({plan.epochs:.3g} times through {records} records)",
        *([f"shapes: {shapes}"] if shapes else []),
        f"on: {plan.gpus} x {plan.card}, {plan.card_gib:.1f} GiB each; speeds: {plan.source}; {plan.form} form, "
        f"attention {plan.kernel}",
        *(plan.calibration.format_lines() if plan.calibration else ()),
        "",
        f"memory per GPU: {plan.memory.gpu / GIB:.1f} GiB, {verdict}",
        *(f"  {PART_NAMES[name]:40}{value / GIB:7.1f} GiB" for name, value in plan.memory.gpu_parts.items() if value),
        f"host memory per GPU: {plan.memory.host / GIB:.1f} GiB",
        "",
        "other modes, per GPU:",
        *(f"  {mode.name:60}{mode.gib:7.1f} GiB  {'fits' if mode.fits else 'too large'}" for mode in plan.modes),
        "",
        *format_costs(plan, config),
    ]


def format_costs(plan: RunPlan, config: DistillConfig) -> list[str]:
    """The lines of time, money and disk."""
    faster = [f"  {item.iteration_seconds:.2f} s with {item.name}" for item in plan.faster]
    money = "" if plan.cost is None else f", costs {plan.cost:,.0f}"
    spread = " (more than 8 GPUs: not measured; a slow network adds to it)" * (plan.gpus > 8)
    return [
        f"time: {plan.iteration_seconds:.2f} s per iteration, {plan.hours:.1f} hours, "
        f"{plan.gpu_hours:.0f} GPU-hours{money}{spread}",
        *faster,
        f"encode: {format_hours(plan.encode_hours)}, {plan.data_bytes / 1e9:.1f} GB of shards",
        f"checkpoint: {plan.memory.checkpoint / 1e9:.1f} GB every {config.checkpoint_every} iterations, training waits "
        f"{plan.pause_seconds:.1f} s; disk for the run {plan.run_bytes / 1e9:.0f} GB",
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
