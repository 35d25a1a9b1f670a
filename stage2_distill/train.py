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
from common.files import has_foreign_files
from common.model_folder import fingerprint_folder, locate_model
from common.options import read_yaml, write_config
from shards.dataset import DataSet, RecordStream, prefetch_ordered
from shards.manifest import Manifest, check_manifest
from shards.mixture import DataSetMixture, open_data_sets
from stage2_distill.build import open_trainer
from stage2_distill.checkpointing.format import SAMPLER, StudentFacts, checkpoints
from stage2_distill.checkpointing.writer import Saver
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import start
from stage2_distill.distributed.signals import Stop
from stage2_distill.dmd.condition_dropout import vary
from stage2_distill.dmd.schedule import CRITIC, STUDENT, Part, accumulation, parts, position
from stage2_distill.model.attention import repeatable
from stage2_distill.monitoring.metrics_log import METRICS, Step, whole_lines
from stage2_distill.monitoring.monitor import Watch
from stage2_distill.monitoring.preview import STORE, Previews, PreviewStudent, open_previews
from stage2_distill.optim.optimizers import form_of
from stage2_distill.resume import begin, state
from stage2_distill.trainer import DivergedError, Trainer, train_step

CONFIG = "distill.yaml"
SPEED = {"keep_activations", "attention", "compile", "offload", "text_rows", "memory"}  # memory: see check_tensors
SEEN = {"wandb", "preview_every", "preview_count", "preview_data"}
CHECKPOINTS = {"checkpoint_every", "checkpoint_beside", "keep", "keep_every"}
MAY_CHANGE = {"out", "iterations", "device", "batch_size", "model", "replicate"} | SPEED | SEEN | CHECKPOINTS


def distill(config: DistillConfig) -> Path:
    """Train, or go on training, and return the newest checkpoint."""
    ranks = start(config.device, replicate=config.replicate)
    if not repeatable(config.attention, getattr(torch, config.dtype), ranks.device) and ranks.rank == 0:
        logging.warning(
            "attention on cuDNN adds in any order: resumed, this run differs in its last bits from one never stopped; "
            "the package flash-attn-3 keeps an order, and so does --attention flash, which is slower"
        )
    model = locate_model(config.model, ("transformer",))
    data = open_data_sets(config.shards)
    check_manifest(Path(config.shards[0]), data.manifest, spec=config.spec, encoder=expected_encoder(model))
    accumulation(config, ranks.world)
    out = Path(config.out)
    open_folder(out, config, first=ranks.rank == 0)
    trainer = open_trainer(config, ranks, model, data)
    facts = student_facts(config, model, data.manifest, form_of(trainer.student_optimizer))
    done = begin(out, trainer, facts)
    iterate(out, trainer, data, facts, done)
    return checkpoints(out)[-1]


def expected_encoder(model: Path) -> dict[str, object]:
    """Fingerprints of those encoders that lie beside the transformer; nothing is loaded."""
    return {part: fingerprint_folder(model / part) for part in ("vae", "text_encoder") if (model / part).is_dir()}


def open_folder(out: Path, config: DistillConfig, *, first: bool) -> None:
    """Make the run's folder, or refuse one that holds something else or a run with other options.

    Until its first iteration is done any option may change; only a preview would be of the old ones.
    """
    if has_foreign_files(out, CONFIG):
        raise ValueError(f"out={out}: holds something that is not a run of distill; name an empty folder")
    changed = changes(out / CONFIG, config) if (out / CONFIG).is_file() else []
    if changed and (whole_lines(out / METRICS) or checkpoints(out)):
        raise ValueError(f"out={out}: holds a run with other options: {'; '.join(changed)}")
    dist.barrier()  # every rank has looked before the first one writes
    if first:
        out.mkdir(parents=True, exist_ok=True)
        if changed:
            shutil.rmtree(out / STORE, ignore_errors=True)
        write_config(out / CONFIG, config)


def changes(stored: Path, config: DistillConfig) -> list[str]:
    """What would make another run of the one whose configuration is stored, in words."""
    before = read_yaml(str(stored))
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return [
        f"{key}: {value!r}, was {before.get(key)!r}"
        for key, value in now.items()
        if value != before.get(key) and key not in MAY_CHANGE
    ]


def student_facts(config: DistillConfig, model: Path, manifest: Manifest, memory: str) -> StudentFacts:
    """What every checkpoint of this run says of its student."""
    return StudentFacts(
        iteration=0,
        ladder=config.ladder,
        shift=config.shift,
        sampler=SAMPLER,
        spec=config.spec,
        base_model=config.model,
        transformer=fingerprint_folder(model / "transformer"),
        vae=manifest.encoder.vae,
        text_encoder=manifest.encoder.text_encoder,
        config=asdict(config),
        memory=memory,
    )


def iterate(out: Path, trainer: Trainer, data: DataSet | DataSetMixture, facts: StudentFacts, done: int) -> None:
    """Iterations `done`..end, each logged, with a checkpoint now and then, at the end, and when told to stop."""
    config, ranks = trainer.config, trainer.ranks
    previews = start_previews(out, trainer, data, done)
    reached = done
    with (
        closing(conditions(trainer, data, done)) as loaded,
        Watch(out, config, ranks, start=done) as watch,
        Saver(out, config, ranks) as saver,
        Stop() as stop,
    ):
        optimizers = {STUDENT: trainer.student_optimizer, CRITIC: trainer.critic_optimizer}
        saver.before_steps_of(optimizers, trainer.clock)
        for iteration in range(done, config.iterations):
            watch.write(iteration, attempt(trainer, iteration, loaded, saver))
            reached = iteration + 1
            if iteration == done and config.checkpoint_beside:
                saver.prepare(state(trainer))
            if previews.due(reached):
                saver.copied()  # the average takes the student's place meanwhile
                previews.make(preview_student(trainer), reached)
            ending = stop.wanted() or reached == config.iterations
            if ending or reached % config.checkpoint_every == 0:
                watch.sync()
                with trainer.clock("checkpoint"):
                    stands = replace(facts, iteration=reached, position=position(reached, config))
                    saver.save(state(trainer), stands)
            if ending:
                break
        saver.finish()
    if ranks.rank == 0:
        previews.close(done=reached == config.iterations)
        if reached < config.iterations:
            logging.info("stopped after iteration %d; resume with the same command", reached)


def preview_student(trainer: Trainer) -> PreviewStudent:
    """What previews need of a trainer."""
    student = trainer.roles.student
    denoiser = trainer.denoiser(student)
    return PreviewStudent(trainer.config, trainer.ranks, student, denoiser, trainer.ema, trainer.clock)


def start_previews(out: Path, trainer: Trainer, data: DataSet | DataSetMixture, done: int) -> Previews:
    """The previews of a run, of which a new one makes the first at once."""
    previews = open_previews(out, trainer.config, data)
    if trainer.ranks.rank == 0:
        previews.close(done=False)
    if done == 0 and previews.due(0):
        previews.make(preview_student(trainer), 0)
    return previews


def attempt(trainer: Trainer, iteration: int, loaded: Iterator[tuple[Part, Condition]], saver: Saver) -> Step:
    """One iteration; where it diverged, the error says what to do."""
    try:
        return train_step(trainer, iteration, loaded)
    except DivergedError as error:
        saver.wait()  # the last checkpoint may still be on its way
        good = checkpoints(saver.run)
        raise DivergedError(
            f"iteration {iteration}: {error}. The update was not taken. Last good checkpoint: "
            f"{good[-1].name if good else 'none'}. Lower the learning rates or look at the data."
        ) from error


def conditions(trainer: Trainer, data: DataSet | DataSetMixture, done: int) -> Generator[tuple[Part, Condition]]:
    """This rank's micro-batches from iteration `done` on, read ahead by threads, on the device."""
    config, ranks = trainer.config, trainer.ranks
    stream = RecordStream(data, seed=config.seed, text_rows=config.text_rows)

    def read(part: Part) -> tuple[Part, Condition]:
        return part, vary(stream.batch(part.positions).condition, part, config)

    start = done - done % config.student_every if config.rollout_reuse else done
    todo = parts(config, start=start, rank=ranks.rank, world=ranks.world)
    for part, condition in prefetch_ordered(read, todo, depth=8, threads=2):
        here = condition.to(ranks.device)
        if part.iteration >= done:
            yield part, here
        elif part.role == CRITIC:  # done before the run was stopped: remake the rollout that goes on
            trainer.reuse.sample(trainer.denoiser(trainer.roles.student), part, here)
            trainer.reuse.taken.clear()
