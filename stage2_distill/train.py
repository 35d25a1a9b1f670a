"""The command `distill`: open the data and the roles, resume from the newest checkpoint, iterate, save."""

import logging
import shutil
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from common.condition import Condition
from common.model_folder import fingerprint_part, locate_model, locate_part
from common.options import write_config
from common.planning.units import format_hours
from common.video import FrameSize
from shards.dataset import DataSet, prefetch_ordered
from shards.manifest import check_settings
from shards.mixture import DataSetMixture, RecordStream, open_data_sets
from shards.record import pad_text
from stage2_distill.build import build_roles, build_trainer, choose_optimizer_form, describe_machine
from stage2_distill.checkpointing.format import (
    SAMPLER_KIND,
    StudentFacts,
    delete_unfinished,
    iteration_of,
    list_checkpoints,
    step_folder,
)
from stage2_distill.checkpointing.identity import RUN_CONFIG_FILE, check_run
from stage2_distill.checkpointing.writer import CheckpointOptions, CheckpointWriter
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import RankContext, own_folder, start_process_group, wait_for_ranks
from stage2_distill.distributed.signals import StopSignal
from stage2_distill.dmd.condition_dropout import ConditionDropout
from stage2_distill.dmd.schedule import CRITIC, MicroBatch, Schedule
from stage2_distill.dmd.video_shapes import SampleShapes
from stage2_distill.model.attention import enable_determinism
from stage2_distill.monitoring.monitor import TrainingMonitor
from stage2_distill.monitoring.preview import (
    PREVIEW_STORE,
    PreviewOptions,
    PreviewStudent,
    PreviewWriter,
    open_previews,
)
from stage2_distill.planning.duration import list_shapes
from stage2_distill.planning.model_size import read_model_size
from stage2_distill.planning.start_report import start_lines
from stage2_distill.resume import initialize_from, resume_run, training_state
from stage2_distill.trainer import DivergedError, Trainer, train_step
from stage2_distill.weight_files.lora_files import digest_lora, parse_loras


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready for its next iteration."""

    config: DistillConfig
    trainer: Trainer
    data: DataSet | DataSetMixture
    facts: StudentFacts  # what its checkpoints say of the student

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.out)


def distill(config: DistillConfig) -> Path:
    """Start a training run, or resume it, and return its newest checkpoint."""
    ranks = start_process_group(config.device, replicate=config.replicate)
    if not enable_determinism(config.attention, getattr(torch, config.dtype), ranks.device) and ranks.rank == 0:
        logging.warning(
            "attention=cudnn: adds in varying order, so a resumed run differs in its last bits from an unbroken one; "
            "install flash-attn-3 for a fixed order, or use --attention flash, which is slower"
        )
    model = locate_model(config.model, ("transformer",))
    data = open_data_sets(config.shards, many_sizes=True)
    check_data(config, data, expected_encoder(model))
    schedule = Schedule.of(config, ranks.world)
    facts, out = student_facts(config, model, data), Path(config.out)
    check_run(out, config, facts, schedule)  # before anything is written, and anything slow
    with own_folder(out):
        if ranks.rank == 0:
            open_run_folder(out, config, facts, schedule)
            log_plan(config, ranks, model, data)
        largest = list_shapes(config, size_shares(data))[0].config  # whose memory decides the optimizers' form
        roles = build_roles(largest, ranks, model)
        negative_text = pad_text(data.negative, config.max_text_tokens).to(ranks.device)
        trainer = build_trainer(config, ranks, schedule, roles, negative_text)
        run = TrainingRun(config, trainer, data, replace(facts, memory=roles.form))
        train_loop(run, start_or_resume(run))
    return list_checkpoints(out)[-1]


def check_data(config: DistillConfig, data: DataSet | DataSetMixture, encoder: dict[str, object]) -> None:
    """Raise ValueError if the records were encoded by other models, or if none has the configured size."""
    sizes, own = [group.spec.frame_size for group in data.size_groups], config.spec.frame_size
    expected = encoder | {"fps": config.fps}  # not num_frames: a first frame has no length
    check_settings(config.shards[0], data.manifest, expected | (vars(own) if len(sizes) == 1 else {}))
    if own not in sizes:
        raise ValueError(
            f"height={own.height}: no record is of {own} pixels, but {', '.join(map(str, sizes))}; give --height and "
            "--width of one of them, which is that of videos without a first frame"
        )
    if len(sizes) > 1:
        config.check_many_shapes()


def size_shares(data: DataSet | DataSetMixture) -> dict[FrameSize, float]:
    """The share of each size in the records that are read."""
    return {spec.frame_size: share for spec, share in data.size_shares.items()}


def log_plan(config: DistillConfig, ranks: RankContext, model: Path, data: DataSet | DataSetMixture) -> None:
    """Say on what the run computes, what it will take, and how to stop it."""
    size, sizes = read_model_size(str(model)), size_shares(data)
    largest, checkpoints = list_shapes(config, sizes)[0].config, list_checkpoints(Path(config.out))
    form = choose_optimizer_form(largest, ranks, size)
    completed = iteration_of(checkpoints[-1]) if checkpoints else 0
    for line in start_lines(config, size, describe_machine(config, ranks), form, completed, sizes):
        logging.info("%s", line)


def start_or_resume(run: TrainingRun) -> int:
    """Load the newest checkpoint of the run, or the weights that it starts from; the number of completed iterations."""
    trainer, config = run.trainer, run.config
    completed = resume_run(run.folder, trainer.roles, trainer.ranks, trainer.schedule)
    start = f"resuming {run.folder} from {step_folder(run.folder, completed).name}"
    if completed == 0:
        start = f"starting {run.folder} from {config.init_from or config.model}"
        if config.init_from is not None:
            initialize_from(config.init_from, trainer.roles, run.facts, trainer.ranks)
    if trainer.ranks.rank == 0:
        logging.info("%s, on %s: %d of %d iterations", start, ", ".join(config.shards), completed, config.iterations)
    return completed


def expected_encoder(model: Path) -> dict[str, object]:
    """Fingerprints of the encoders that are stored beside the transformer; nothing is loaded."""
    paths = {part: locate_part(model, part) for part in ("vae", "text_encoder")} if model.is_dir() else {}
    return {part: fingerprint_part(path) for part, path in paths.items() if path.exists()}


def open_run_folder(out: Path, config: DistillConfig, facts: StudentFacts, schedule: Schedule) -> None:
    """Write the options of a run into its folder, which this process owns, and delete what a killed run left there.

    Until its first iteration is complete anything may change; then only a preview shows the old run, and is deleted.
    """
    is_same = check_run(out, config, facts, schedule, warn=logging.warning)  # again: another run may have begun since
    delete_unfinished(out)  # first: it may fill the disk
    if not is_same:
        shutil.rmtree(out / PREVIEW_STORE, ignore_errors=True)
    write_config(out / RUN_CONFIG_FILE, config)


def student_facts(config: DistillConfig, model: Path, data: DataSet | DataSetMixture) -> StudentFacts:
    """What every checkpoint of this run says of its student, without the optimizer form."""
    encoder, lengths = data.manifest.encoder, tuple(length.num_frames for length in config.lengths)
    sizes = tuple(group.spec.frame_size for group in data.size_groups)
    return StudentFacts(
        iteration=0,
        ladder=config.timesteps,
        shift=config.shift,
        sampler=SAMPLER_KIND,
        spec=config.spec,
        base_model=config.model,
        transformer=fingerprint_part(locate_part(model, "transformer")),
        vae=encoder.vae,
        text_encoder=encoder.text_encoder,
        config=asdict(config),
        data_sets=data.digests,
        base_loras=tuple(digest_lora(one.path) for one in parse_loras(config.base_lora or ())),
        sizes=sizes if len(sizes) > 1 else (),
        lengths=lengths if len(lengths) > 1 else (),
    )


def train_loop(run: TrainingRun, start_iteration: int) -> None:
    """Train from `start_iteration` on: log each iteration, save at intervals, at the end and on a signal to stop."""
    config, trainer = run.config, run.trainer
    roles, ranks, timer = trainer.roles, trainer.ranks, trainer.timer
    previews, preview_student = start_previews(run, start_iteration)
    completed, began = start_iteration, time.monotonic()
    with (
        closing(load_micro_batches(run, start_iteration)) as loader,
        TrainingMonitor(
            run.folder, ranks, start=start_iteration, end=config.iterations, wandb=config.wandb, options=asdict(config)
        ) as monitor,
        CheckpointWriter(run.folder, config.select(CheckpointOptions), ranks) as writer,
        StopSignal() as stop,
    ):
        micro_batches = timer.time_items(loader, "data")  # host seconds of waiting
        register_step_hooks(run, writer)
        for iteration in range(start_iteration, config.iterations):
            try:
                step = train_step(trainer, iteration, micro_batches)
            except DivergedError as error:
                writer.wait()  # the last checkpoint may still be being written
                raise DivergedError(divergence_message(iteration, error, list_checkpoints(run.folder))) from error
            monitor.write(iteration, step)
            completed = iteration + 1
            if iteration == start_iteration and config.async_checkpoint:  # the first checkpoint must not wait for this
                writer.prepare_buffers(training_state(roles))
            if previews.is_due(completed):
                writer.wait_for_copies()  # a preview changes the student's weights
                previews.write_step(preview_student, completed)
            stopping = stop.is_requested() or completed == config.iterations
            if stopping or completed % config.checkpoint_every == 0:
                monitor.sync()  # a checkpoint must not be newer than its metrics
                with timer("checkpoint"):
                    save_checkpoint(run, writer, completed)
            if stopping:
                break
        writer.finish()
    if ranks.rank == 0:
        previews.close(complete=completed == config.iterations)
        log_end(run, range(start_iteration, completed), time.monotonic() - began)


def register_step_hooks(run: TrainingRun, writer: CheckpointWriter) -> None:
    """Let each optimizer step wait until the copies of what it changes have ended."""
    trainer, roles = run.trainer, run.trainer.roles
    writer.register_step_hooks({role.name: role.optimizer for role in (roles.student, roles.critic)}, trainer.timer)
    if trainer.ida_share:  # the critic moves right after the student's step
        writer.register_step_hooks({CRITIC: roles.student.optimizer}, trainer.timer)


def log_end(run: TrainingRun, iterations: range, seconds: float) -> None:
    """Say what the iterations of this start took, and whether the run has all."""
    device = run.trainer.ranks.device
    if iterations:
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        each = f"{seconds / len(iterations):.2f} s each"
        logging.info("%d iterations in %s, %s%s", len(iterations), format_hours(seconds / 3600), each, peak)
    if iterations.stop < run.config.iterations:
        logging.info("stopped after iteration %d; resume with the same command", iterations.stop)


def save_checkpoint(run: TrainingRun, writer: CheckpointWriter, completed: int) -> None:
    """Start the checkpoint of `completed` iterations."""
    schedule = run.trainer.schedule
    facts = replace(run.facts, iteration=completed, position=schedule.stream_position(completed))
    # what changes first is copied first
    writer.save(training_state(run.trainer.roles), facts, first=schedule.updated_roles(completed)[0])


def start_previews(run: TrainingRun, start_iteration: int) -> tuple[PreviewWriter, PreviewStudent]:
    """The previews of a run and what they sample; a new run writes the first one here."""
    config, trainer = run.config, run.trainer
    options = config.select(PreviewOptions, spec=config.spec, sigmas=config.sigmas)
    previews = open_previews(run.folder, options, run.data)
    roles = trainer.roles
    student = PreviewStudent(
        options, trainer.ranks, roles.student.net, roles.student.denoiser, roles.ema, trainer.timer
    )
    if trainer.ranks.rank == 0:  # `decode --watch` waits for more
        previews.open()
    wait_for_ranks()
    if start_iteration == 0 and previews.is_due(0):
        previews.write_step(student, 0)
    return previews, student


def divergence_message(iteration: int, error: DivergedError, checkpoints: list[Path]) -> str:
    """What happened and what to do."""
    return (
        f"iteration {iteration}: {error}. The update was not applied. Last good checkpoint: "
        f"{checkpoints[-1].name if checkpoints else 'none'}. Lower the learning rates or check the data."
    )


def load_micro_batches(run: TrainingRun, start_iteration: int) -> Generator[tuple[MicroBatch, Condition]]:
    """Yield this rank's micro-batches from `start_iteration` on, on the device; threads read ahead."""
    config, trainer = run.config, run.trainer
    stream = RecordStream(run.data, seed=config.seed, max_text_tokens=config.max_text_tokens)
    dropout = config.select(ConditionDropout)

    def read_micro_batch(micro_batch: MicroBatch) -> tuple[MicroBatch, Condition]:
        return micro_batch, dropout.augment(stream.read_batch(micro_batch.positions), micro_batch)

    # a reused rollout began at the student's last turn
    start = start_iteration - (start_iteration % config.student_update_interval if config.rollout_reuse else 0)
    shapes = SampleShapes(config.seed, config.lengths, stream.record_spec)
    schedule = trainer.schedule.micro_batches(start=start, rank=trainer.ranks.rank, shapes=shapes)
    for micro_batch, condition in prefetch_ordered(read_micro_batch, schedule, depth=8, threads=2):
        device_condition = condition.to(trainer.ranks.device)
        if micro_batch.iteration >= start_iteration:
            yield micro_batch, device_condition
        elif micro_batch.role == CRITIC:  # completed before the run was stopped
            trainer.accumulator.critic_rollouts.simulate(micro_batch, device_condition, exit_index=0)
