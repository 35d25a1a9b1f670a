"""What a training run will need: memory by mode, time, money and disk. Imports no torch."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from common.planning.cards import Card, planned_kernel
from common.planning.codec_cost import decode_seconds, encode_seconds, record_bytes
from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig
from stage2_distill.planning.calibration import Calibration
from stage2_distill.planning.duration import (
    ShapeShare,
    denoising_seconds,
    forward_seconds,
    iteration_seconds,
    mean_over_shapes,
)
from stage2_distill.planning.memory import MemoryEstimate, choose_form, estimate_memory
from stage2_distill.planning.network_size import TransformerSize

GIB = 2**30
START_SECONDS = 90  # imports, loading and compilation of a run (benchmarks/results/modes-*)
PAUSE_SECONDS = 1.5  # of training for an asynchronous checkpoint: 0.8 to 1.5 s measured on 1 to 4 GPUs
DISK_RATE = 1e9  # bytes per second, assumed: of a checkpoint that training waits for
ADAPTERS: dict[str, object] = {
    "lora_rank": 32,
    "optimizer_form": STANDARD,
    "activation_checkpointing": "offload",
    "replicate": 1,
}
MORE_GPUS = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class PlannedMode:
    """Memory of the run with other options."""

    name: str
    gib: float  # peak per GPU
    fits: bool


@dataclass(frozen=True)
class FasterRun:
    """Time of an iteration with other options, which change no result beyond rounding unless they say so."""

    name: str
    iteration_seconds: float


@dataclass(frozen=True)
class RunPlan:
    """Predictions for a run on one kind of GPU; sizes in bytes unless they say GiB."""

    gpus: int
    card: str
    card_gib: float
    source: str  # of the card's speeds
    parameters: int
    form: str
    kernel: str
    memory: MemoryEstimate
    fits: bool
    modes: tuple[PlannedMode, ...]
    remedy: str  # what would make it fit; empty if it does
    iteration_seconds: float
    faster: tuple[FasterRun, ...]
    hours: float
    gpu_hours: float
    cost: float | None
    encode_hours: float
    data_bytes: float
    run_bytes: float  # of the checkpoints that are kept, one more being written
    pause_seconds: float  # of training, per checkpoint
    video_seconds: float  # of a video by the student on one GPU
    epochs: float  # times that each record is used
    calibration: Calibration | None  # by iterations that ran here


def make_plan(
    shapes: Sequence[ShapeShare], size: TransformerSize, card: Card, *, gpus: int, records: int, price: float | None,
    calibration: Calibration | None = None,
) -> RunPlan:  # fmt: skip
    """Plan a run of these shapes; ValueError if the GPUs do not divide its batch or its copies."""
    config, card = shapes[0].config, calibration.correct_card(card) if calibration else card  # the largest's memory
    total, kernel = card.memory_gib * GIB, calibration.kernel if calibration else planned_kernel(config.attention, card)
    form = choose_form(config, size, world=gpus, gpu_bytes=total)
    memory = estimate_memory(config, size, world=gpus, form=form)
    memory = calibration.correct_memory(memory) if calibration else memory
    speed = partial(iteration_seconds, size=size, card=card, world=gpus, form=form, kernel=kernel)
    seconds = mean_over_shapes(shapes, speed)
    pause = PAUSE_SECONDS if config.async_checkpoint else memory.checkpoint / DISK_RATE
    hours = run_hours(config, seconds, pause)
    modes, fits = tuple(compare_modes(config, size, gpus=gpus, total=total)), memory.fits(total)
    return RunPlan(
        gpus=gpus,
        card=card.name,
        card_gib=card.memory_gib,
        source=card.source,
        parameters=size.parameters,
        form=form,
        kernel=kernel,
        memory=memory,
        fits=fits,
        modes=modes,
        remedy="" if fits else find_remedy(config, size, modes, gpus=gpus, total=total),
        iteration_seconds=seconds,
        faster=tuple(compare_speeds(shapes, size, card, gpus=gpus, form=form, kernel=kernel)),
        hours=hours,
        gpu_hours=hours * gpus,
        cost=None if price is None else hours * gpus * price,
        encode_hours=mean_over_shapes(shapes, lambda one: encode_seconds(records, one.spec, card, gpus=gpus) / 3600),
        data_bytes=records * mean_over_shapes(shapes, lambda one: record_bytes(one.spec, size.text_dim)),
        run_bytes=memory.checkpoint * (kept_checkpoints(config) + 1),
        pause_seconds=pause,
        video_seconds=student_seconds(config, size, card, kernel),
        epochs=updates(config) * config.global_batch / records,
        calibration=calibration,
    )


def run_hours(config: DistillConfig, seconds: float, pause: float) -> float:
    """Hours of a run, from the seconds of an iteration and of the pause for a checkpoint."""
    checkpoints = -(-config.iterations // config.checkpoint_every)  # rounded up: the last iteration has one
    return (START_SECONDS + config.iterations * seconds + checkpoints * pause) / 3600


def kept_checkpoints(config: DistillConfig) -> int:
    """Checkpoints that a run has at its end."""
    saved = [*range(config.checkpoint_every, config.iterations, config.checkpoint_every), config.iterations]
    kept = saved[: -config.keep_last] if config.keep_every else []
    return min(len(saved), config.keep_last) + sum(one % config.keep_every == 0 for one in kept)


def student_seconds(config: DistillConfig, size: TransformerSize, card: Card, kernel: str) -> float:
    """Seconds of a video by the student on one GPU, from prompt and picture to the file."""
    forward = forward_seconds(size, config.spec, card, kernel, text_tokens=config.max_text_tokens).total
    denoising = denoising_seconds(forward, steps=len(config.timesteps), compiled=config.compile)
    return denoising + decode_seconds(config.spec, card)


def updates(config: DistillConfig) -> float:
    """Updates of both roles in a run, each of which reads a global batch."""
    matched = config.iterations - config.teacher_warmup  # in the iterations before, only the student is updated
    student = min(config.iterations, config.teacher_warmup)
    return student + max(0, matched) + max(0, matched - config.critic_warmup) / config.student_update_interval


def compare_modes(config: DistillConfig, size: TransformerSize, *, gpus: int, total: float) -> Iterator[PlannedMode]:
    """Memory of the run in each mode that its other options allow."""
    whole: dict[str, object] = {"lora_rank": 0, "lora_alpha": None}
    compact = whole | {"optimizer_form": COMPACT}
    copies = f" --replicate {gpus}" * (gpus > 1)
    modes = {
        "--optimizer-form standard": whole | {"optimizer_form": STANDARD},
        "--optimizer-form compact": compact,
        "--optimizer-form compact --activation-checkpointing full": compact | {"activation_checkpointing": "full"},
        f"--optimizer-form compact --offload all{copies}": compact | {"offload": "all", "replicate": gpus},
        "--lora-rank 32 --activation-checkpointing offload": ADAPTERS,
    }
    for name, changes in modes.items():
        with suppress(ValueError):  # this run's other options exclude the mode
            changed = replace(config, **changes)  # type: ignore[arg-type]
            memory = estimate_memory(changed, size, world=gpus, form=changed.optimizer_form)
            yield PlannedMode(name, memory.gpu / GIB, memory.fits(total))


def compare_speeds(
    shapes: Sequence[ShapeShare], size: TransformerSize, card: Card, *, gpus: int, form: str, kernel: str
) -> Iterator[FasterRun]:
    """Time of an iteration with each faster option that the run does not have, added one after the other."""
    config, name, changes = shapes[0].config, "", dict[str, bool]()
    steps = {
        "--compile": "compile",
        "flash-attn-3 installed": "",
        "--rollout-reuse (another order of samples)": "rollout_reuse",
    }
    for step, option in steps.items():
        if option and not vars(config)[option]:
            changes[option] = True
        elif not option and planned_kernel("flash", card) == "flash-3" != kernel and config.attention == AUTO:
            kernel = "flash-3"
        else:
            continue
        name = f"{name}, {step}" if name else step
        speed = partial(iteration_seconds, size=size, card=card, world=gpus, form=form, kernel=kernel)
        faster = [replace(one, config=replace(one.config, **changes)) for one in shapes]  # type: ignore[arg-type]
        yield FasterRun(name, mean_over_shapes(faster, speed))


def find_remedy(
    config: DistillConfig, size: TransformerSize, modes: tuple[PlannedMode, ...], *, gpus: int, total: float
) -> str:
    """The options, or the number of GPUs, with which a run would fit."""
    remedies = [mode.name for mode in modes if mode.fits][:1]
    if config.batch_size > 1:
        remedies.append("a smaller --batch-size")
    for count in (count for count in MORE_GPUS if count > gpus):
        with suppress(ValueError):  # its batch does not divide by them
            form = choose_form(config, size, world=count, gpu_bytes=total)
            if estimate_memory(config, size, world=count, form=form).fits(total):
                remedies.append(f"{count} GPUs")
                break
    return " or ".join(remedies) or "a card with more memory, or a smaller video"
