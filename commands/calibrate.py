"""`plan --calibrate`: iterations of the planned run on this machine, on random data; nothing is written."""

import os
import time
from dataclasses import replace

import torch

from common.condition import Condition
from common.model_folder import locate_model
from common.planning.cards import Card, find_card
from common.progress import track_progress
from common.seed import make_generator
from stage2_distill.build import build_roles, build_trainer, choose_optimizer_form, describe_machine
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.schedule import MicroBatch, Schedule
from stage2_distill.dmd.video_shapes import SampleShapes
from stage2_distill.model.attention import enable_determinism
from stage2_distill.monitoring.metrics_log import StepResult
from stage2_distill.monitoring.monitor import peak_memory_gib
from stage2_distill.planning.calibration import GIB, Calibration, MeasuredIteration, compare_run
from stage2_distill.planning.duration import RolloutPasses
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.trainer import Trainer, train_step

WARM_UP, MEASURED = 2, 2  # iterations of either kind: with the student's update, and of the critic alone


def calibrate(run: DistillConfig, size: TransformerSize, card: Card) -> Calibration:
    """Measure a run with one micro-batch per rank on this machine's GPUs, or its CPU; all ranks of torchrun call it.

    `card` stands for a machine that is not in the table of speeds. ValueError if the run does not fit the GPU.
    """
    ranks = start_process_group(run.device, replicate=run.replicate)
    config = one_micro_batch(run, ranks.world)
    enable_determinism(config.attention, getattr(torch, config.dtype), ranks.device)
    form, machine = choose_optimizer_form(config, ranks, size), describe_machine(config, ranks)
    if not machine.has_gpu:
        machine = replace(machine, total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        roles = build_roles(config, ranks, locate_model(config.model, ("transformer",)))
        negative = torch.zeros(config.max_text_tokens, size.text_dim, device=ranks.device)
        trainer = build_trainer(config, ranks, Schedule.of(config, ranks.world), roles, negative)
        iterations = measure_iterations(config, trainer, size)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "calibrate=True: the run does not fit into this GPU's memory; plan without it says what would fit"
        ) from error
    peak = peak_memory_gib(ranks.device) * GIB
    return compare_run(config, size, find_card(machine.device) or card, machine, form, iterations, peak)


def one_micro_batch(run: DistillConfig, world: int) -> DistillConfig:
    """The run with one micro-batch per rank and update, where the student's turn is every second iteration."""
    return replace(
        run,
        num_frames=run.spec.num_frames,  # of several lengths the longest
        global_batch=run.batch_size * world,
        iterations=WARM_UP + MEASURED,
        student_update_interval=2,
        critic_warmup=0,
        teacher_warmup=0,
        rollout_reuse=False,  # its passes differ from iteration to iteration
        async_checkpoint=False,  # nothing is saved, so nothing is copied
    )


def measure_iterations(config: DistillConfig, trainer: Trainer, size: TransformerSize) -> list[MeasuredIteration]:
    """Run the iterations on random data; those after the warm-up, which also compiles, are returned."""
    draws = make_generator(config.seed, 0, 0, "calibrate")
    text = torch.randn(config.batch_size, config.max_text_tokens, size.text_dim, generator=draws)
    frames = torch.randn(config.batch_size, *config.spec.first_frame_shape, generator=draws)
    condition = Condition(frames, text).to(trainer.ranks.device)
    shapes = SampleShapes(config.seed, config.lengths, lambda position: config.spec)
    measured, total = [], config.iterations
    for iteration in track_progress(range(total), total=total, label="calibrate"):
        parts = trainer.schedule.micro_batches(start=iteration, rank=trainer.ranks.rank, shapes=shapes)
        began = time.perf_counter()
        step = run_step(trainer, iteration, [(part, condition) for part in parts if part.iteration == iteration])
        measured.append(MeasuredIteration(time.perf_counter() - began, count_passes(step)))
    return measured[WARM_UP:]


def run_step(trainer: Trainer, iteration: int, batches: list[tuple[MicroBatch, Condition]]) -> StepResult:
    """One iteration, ended on the device too."""
    step = train_step(trainer, iteration, iter(batches))
    if trainer.ranks.device.type == "cuda":
        torch.cuda.synchronize(trainer.ranks.device)
    return step


def count_passes(step: StepResult) -> RolloutPasses:
    """Forward passes of an iteration's rollouts, each of which leaves at the exit that was drawn."""
    assert step.critic is not None, "the critic is updated in every iteration after a warm-up"
    critic = step.critic.exit_index
    student = 0 if step.student is None else step.student.exit_index
    assert critic is not None and student is not None, "one micro-batch has one exit"
    return RolloutPasses(critic + 1, student + 1, float(step.student is not None))
