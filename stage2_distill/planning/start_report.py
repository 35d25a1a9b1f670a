"""The lines with which a training run begins: on what, memory, time, output, how to stop. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from common.planning.cards import find_card, planned_kernel
from common.planning.units import format_bytes, format_hours, free_bytes
from common.video import FrameSize
from stage2_distill.config import DistillConfig
from stage2_distill.planning.duration import ShapeShare, iteration_seconds, list_shapes, mean_over_shapes
from stage2_distill.planning.machine import Machine
from stage2_distill.planning.memory import MemoryEstimate, estimate_memory
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.planning.plan_text import count_shapes
from stage2_distill.planning.run_plan import GIB, compare_modes, find_remedy, kept_checkpoints


def start_lines(
    config: DistillConfig,
    size: TransformerSize,
    machine: Machine,
    form: str,
    completed: int,
    sizes: Mapping[FrameSize, float] = MappingProxyType({}),
) -> Iterator[str]:
    """What a run says before anything slow; `completed` iterations are done.

    sizes: {size: share of the records}, empty for the configured one.
    """
    shapes, described = list_shapes(config, sizes), count_shapes(config, sizes)
    config = shapes[0].config  # of the largest, which decides the memory
    memory = estimate_memory(config, size, world=machine.ranks, form=form)
    yield (
        f"on {machine.ranks} x {machine.device}: {form} form, attention {machine.kernel}, activations "
        f"{config.activation_checkpointing}{', compiled' * config.compile}; {describe_memory(memory, machine)}"
    )
    if machine.has_gpu and not memory.fits(machine.total_bytes):
        modes = tuple(compare_modes(config, size, gpus=machine.ranks, total=machine.total_bytes))
        remedy = find_remedy(config, size, modes, gpus=machine.ranks, total=machine.total_bytes)
        yield f"WARNING: this may be more memory than the GPU has; if it is, use {remedy}"
    if described:
        yield described
    yield describe_time(shapes, size, machine, form, config.iterations - completed)
    first_turn = -(-config.critic_warmup // config.student_update_interval) * config.student_update_interval
    if first_turn >= config.iterations and not config.teacher_warmup:
        warning = (
            f"critic_warmup={config.critic_warmup}: the student is not updated in {config.iterations} "
            "iterations and stays the teacher; give more --iterations or a smaller --critic-warmup"
        )
        yield f"WARNING: {warning}"
    yield describe_output(config, memory)
    yield "to stop: Ctrl-C or SIGTERM, which saves a checkpoint; the same command resumes"


def describe_memory(memory: MemoryEstimate, machine: Machine) -> str:
    """Predicted memory of a rank."""
    host = f"{memory.host / GIB:.1f} GiB of host memory per rank"
    if not machine.has_gpu:
        return f"about {(memory.gpu + memory.host) / GIB:.1f} GiB of memory per rank"
    return f"about {memory.gpu / GIB:.1f} of {machine.total_bytes / GIB:.1f} GiB per GPU, {host}"


def describe_time(
    shapes: Sequence[ShapeShare], size: TransformerSize, machine: Machine, form: str, iterations: int
) -> str:
    """Predicted time of the iterations that are left."""
    card = find_card(machine.device)
    if card is None:
        return f"{iterations} iterations to do; this device is not in the table of speeds, so watch the progress"
    planned = planned_kernel(shapes[0].config.attention, card)
    kernel = planned if machine.kernel in ("torch", "math") else machine.kernel
    speed = partial(iteration_seconds, size=size, card=card, world=machine.ranks, form=form, kernel=kernel)
    seconds = mean_over_shapes(shapes, speed)
    hours, source = iterations * seconds / 3600, card.source
    accuracy = "" if source == "measured" else f" ({source})"
    spent = f"{format_hours(hours)}, {hours * machine.ranks:.1f} GPU-hours"
    return f"{iterations} iterations to do: about {seconds:.2f} s each, {spent}{accuracy}"


def describe_output(config: DistillConfig, memory: MemoryEstimate) -> str:
    """Where the checkpoints go, and whether the disk has room for them."""
    free, needed = free_bytes(Path(config.out)), memory.checkpoint * (kept_checkpoints(config) + 1)
    state = "" if free > needed else ": TOO LITTLE, use a larger disk or a smaller --keep-last"
    return (
        f"output: {config.out}, a checkpoint of {format_bytes(memory.checkpoint)} every {config.checkpoint_every} "
        f"iterations, {kept_checkpoints(config)} kept; needs {format_bytes(needed)}, {format_bytes(free)} free{state}"
    )
