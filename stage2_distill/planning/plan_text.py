"""A plan in words: all of it for `plan`, eight lines at most for the start of a run. Imports no torch."""

from common.planning.units import format_hours
from stage2_distill.config import DistillConfig
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


def format_plan(plan: RunPlan, config: DistillConfig, *, records: int) -> list[str]:
    """The lines of the command `plan`."""
    gigabytes = plan.parameters / 1e9
    size = f"{config.num_frames} x {config.height} x {config.width}"
    verdict = "fits" if plan.fits else f"DOES NOT FIT; use {plan.remedy}"
    return [
        f"run: {gigabytes:.2f} G parameters at {size}, {len(config.timesteps)} steps, {config.iterations} iterations "
        f"of global batch {config.global_batch} ({plan.epochs:.3g} times through {records} records)",
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
