"""A run: open the data and the roles, go on from the newest checkpoint, iterate, save."""

import logging
import shutil
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from common.condition import Condition
from common.files import refuse_foreign_files
from common.model_folder import fingerprint_folder, locate_model
from common.options import read_yaml, rename_old_keys, write_config
from shards.dataset import DataSet, prefetch_ordered
from shards.manifest import Manifest, check_manifest
from shards.mixture import DataSetMixture, RecordStream, open_data_sets
from stage2_distill.build import build_trainer
from stage2_distill.checkpointing.format import SAMPLER_KIND, StudentFacts, list_checkpoints
from stage2_distill.checkpointing.writer import CheckpointWriter
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.distributed.signals import StopSignal
from stage2_distill.dmd.condition_dropout import augment_condition
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch, accumulation_steps, micro_batches, stream_position
from stage2_distill.model.attention import enable_determinism
from stage2_distill.monitoring.metrics_log import METRICS_FILE, StepResult, complete_lines
from stage2_distill.monitoring.monitor import TrainingMonitor
from stage2_distill.monitoring.preview import PREVIEW_STORE, PreviewWriter, read_preview_records
from stage2_distill.optim.optimizers import optimizer_form
from stage2_distill.resume import resume_run, training_state
from stage2_distill.trainer import DivergedError, Trainer, train_step

RUN_CONFIG_FILE = "distill.yaml"
SPEED_OPTIONS = {
    "activation_checkpointing",
    "attention",
    "compile",
    "offload",
    "max_text_tokens",
    "optimizer_form",
}  # memory: see check_tensors
MONITORING_OPTIONS = {"wandb", "preview_every", "preview_count", "preview_data"}
CHECKPOINT_OPTIONS = {"checkpoint_every", "async_checkpoint", "keep_last", "keep_every"}
CHANGEABLE_OPTIONS = (
    {"out", "iterations", "device", "batch_size", "model", "replicate"}
    | SPEED_OPTIONS
    | MONITORING_OPTIONS
    | CHECKPOINT_OPTIONS
)


def distill(config: DistillConfig) -> Path:
    """Train, or go on training, and return the newest checkpoint."""
    ranks = start_process_group(config.device, replicate=config.replicate)
    if not enable_determinism(config.attention, getattr(torch, config.dtype), ranks.device) and ranks.rank == 0:
        logging.warning(
            "attention on cuDNN adds in any order: resumed, this run differs in its last bits from one never stopped; "
            "the package flash-attn-3 keeps an order, and so does --attention flash, which is slower"
        )
    model = locate_model(config.model, ("transformer",))
    data = open_data_sets(config.shards)
    check_manifest(Path(config.shards[0]), data.manifest, spec=config.spec, encoder=expected_encoder(model))
    accumulation_steps(config, ranks.world)
    out = Path(config.out)
    open_run_folder(out, config, first=ranks.rank == 0)
    trainer = build_trainer(config, ranks, model, data)
    facts = student_facts(config, model, data.manifest, optimizer_form(trainer.student_optimizer))
    completed = resume_run(out, trainer, facts)
    train_loop(out, trainer, data, facts, completed)
    return list_checkpoints(out)[-1]


def expected_encoder(model: Path) -> dict[str, object]:
    """Fingerprints of those encoders that lie beside the transformer; nothing is loaded."""
    return {part: fingerprint_folder(model / part) for part in ("vae", "text_encoder") if (model / part).is_dir()}


def open_run_folder(out: Path, config: DistillConfig, *, first: bool) -> None:
    """Make the run's folder, or refuse one that holds something else or a run with other options.

    Until its first iteration is done any option may change; only a preview would be of the old ones.
    """
    if not (out / RUN_CONFIG_FILE).is_file():
        refuse_foreign_files(out, lambda name: name == f"{RUN_CONFIG_FILE}.partial")
    changed = changed_options(out / RUN_CONFIG_FILE, config) if (out / RUN_CONFIG_FILE).is_file() else []
    if changed and (complete_lines(out / METRICS_FILE) or list_checkpoints(out)):
        raise ValueError(f"out={out}: holds a run with other options: {'; '.join(changed)}")
    dist.barrier()  # every rank has looked before the first one writes
    if first:
        out.mkdir(parents=True, exist_ok=True)
        if changed:
            shutil.rmtree(out / PREVIEW_STORE, ignore_errors=True)
        write_config(out / RUN_CONFIG_FILE, config)


def changed_options(stored: Path, config: DistillConfig) -> list[str]:
    """What would make another run of the one whose configuration is stored, in words."""
    stored_options = rename_old_keys(DistillConfig, read_yaml(str(stored)))
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return [
        f"{key}: {value!r}, was {stored_options.get(key)!r}"
        for key, value in options.items()
        if value != stored_options.get(key) and key not in CHANGEABLE_OPTIONS
    ]


def student_facts(config: DistillConfig, model: Path, manifest: Manifest, form: str) -> StudentFacts:
    """What every checkpoint of this run says of its student."""
    return StudentFacts(
        iteration=0,
        ladder=config.timesteps,
        shift=config.shift,
        sampler=SAMPLER_KIND,
        spec=config.spec,
        base_model=config.model,
        transformer=fingerprint_folder(model / "transformer"),
        vae=manifest.encoder.vae,
        text_encoder=manifest.encoder.text_encoder,
        config=asdict(config),
        memory=form,
    )


def train_loop(
    out: Path, trainer: Trainer, data: DataSet | DataSetMixture, facts: StudentFacts, start_iteration: int
) -> None:
    """Iterations `done`..end, each logged, with a checkpoint now and then, at the end, and when told to stop."""
    config, ranks = trainer.config, trainer.ranks
    previews = start_previews(out, trainer, data, start_iteration)
    completed = start_iteration
    with (
        closing(load_micro_batches(trainer, data, start_iteration)) as micro_batches,
        TrainingMonitor(out, config, ranks, start=start_iteration) as watch,
        CheckpointWriter(out, config, ranks) as saver,
        StopSignal() as stop,
    ):
        optimizers = {STUDENT: trainer.student_optimizer, CRITIC: trainer.critic_optimizer}
        saver.register_step_hooks(optimizers, trainer.timer)
        for iteration in range(start_iteration, config.iterations):
            watch.write(iteration, run_iteration(trainer, iteration, micro_batches, saver))
            completed = iteration + 1
            if iteration == start_iteration and config.async_checkpoint:
                saver.prepare_buffers(training_state(trainer))
            if previews.is_due(completed):
                saver.wait_for_copies()  # the average takes the student's place meanwhile
                previews.write_step(completed)
            stopping = stop.is_requested() or completed == config.iterations
            if stopping or completed % config.checkpoint_every == 0:
                watch.sync()
                with trainer.timer("checkpoint"):
                    checkpoint_facts = replace(facts, iteration=completed, position=stream_position(completed, config))
                    saver.save(training_state(trainer), checkpoint_facts)
            if stopping:
                break
        saver.finish()
    if ranks.rank == 0:
        previews.close(complete=completed == config.iterations)
        if completed < config.iterations:
            logging.info("stopped after iteration %d; resume with the same command", completed)


def start_previews(out: Path, trainer: Trainer, data: DataSet | DataSetMixture, start_iteration: int) -> PreviewWriter:
    """The previews of a run, of which a new one makes the first at once."""
    config, ranks, student = trainer.config, trainer.ranks, trainer.roles.student
    records, denoiser = read_preview_records(config, data), trainer.role_denoiser(student)
    previews = PreviewWriter(out / PREVIEW_STORE, records, config, ranks, student, denoiser, trainer.ema, trainer.timer)
    if ranks.rank == 0:
        previews.close(complete=False)
    if start_iteration == 0 and previews.is_due(0):
        previews.write_step(0)
    return previews


def run_iteration(
    trainer: Trainer, iteration: int, micro_batches: Iterator[tuple[MicroBatch, Condition]], saver: CheckpointWriter
) -> StepResult:
    """One iteration; where it diverged, the error says what to do."""
    try:
        return train_step(trainer, iteration, micro_batches)
    except DivergedError as error:
        saver.wait()  # the last checkpoint may still be on its way
        intact = list_checkpoints(saver.run_folder)
        raise DivergedError(
            f"iteration {iteration}: {error}. The update was not taken. Last good checkpoint: "
            f"{intact[-1].name if intact else 'none'}. Lower the learning rates or look at the data."
        ) from error


def load_micro_batches(
    trainer: Trainer, data: DataSet | DataSetMixture, start_iteration: int
) -> Generator[tuple[MicroBatch, Condition]]:
    """This rank's micro-batches from iteration `done` on, read ahead by threads, on the device."""
    config, ranks = trainer.config, trainer.ranks
    stream = RecordStream(data, seed=config.seed, max_text_tokens=config.max_text_tokens)

    def read_micro_batch(part: MicroBatch) -> tuple[MicroBatch, Condition]:
        return part, augment_condition(stream.read_batch(part.positions).condition, part, config)

    start = (
        start_iteration - start_iteration % config.student_update_interval if config.rollout_reuse else start_iteration
    )
    schedule = micro_batches(config, start=start, rank=ranks.rank, world=ranks.world)
    for part, condition in prefetch_ordered(read_micro_batch, schedule, depth=8, threads=2):
        device_condition = condition.to(ranks.device)
        if part.iteration >= start_iteration:
            yield part, device_condition
        elif part.role == CRITIC:  # done before the run was stopped: remake the rollout that goes on
            trainer.rollout_reuse.sample(trainer.role_denoiser(trainer.roles.student), part, device_condition)
            trainer.rollout_reuse.exits_taken.clear()
