"""Student against teacher: every contestant makes the same conditions from the same noise.

Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from common.condition import Condition, Denoiser
from common.device import pick_device
from common.files import write_file
from common.flow import shift
from common.model_folder import fingerprint_folder, locate_model
from common.options import write_config
from common.progress import ProgressBar
from common.seed import draw_normal, make_generator
from shards import latent_store
from shards.comparison import LATENTS_STORE, Candidate, Comparison, latent_set_name, write_comparison
from shards.dataset import open_data_set
from shards.manifest import check_manifest
from shards.record import Record, collate_records, group_by_first_frame, pad_text
from stage2_distill.checkpointing.format import StudentFacts, checkpoints, chosen, newest, read_facts, write_best
from stage2_distill.dmd.rollout import euler, rollout
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import Spread, references, score, spread
from stage2_distill.model.wan import denoiser, guided
from stage2_distill.model.wan import load as load_network
from stage2_distill.sampling.student_sampler import check_model, load_student

CONFIG, SELECTION = "evaluate.yaml", "selection.json"
CHUNK = 4 << 20  # bytes of latents that share a chunk of the store


@dataclass(frozen=True)
class Setting:
    """What all contestants share."""

    config: EvaluateConfig
    facts: StudentFacts  # of the first checkpoint
    records: tuple[Record, ...]  # N
    negative_text: Tensor  # (L D)
    conditions: str  # digest of the records
    scale: float

    @property
    def store(self) -> Path:
        """Where the latents go."""
        return Path(self.config.out) / LATENTS_STORE


@dataclass(frozen=True)
class Sampler:
    """How one contestant makes its videos."""

    contestant: Candidate
    checkpoint: Path | None  # None: the teacher's weights
    sigmas: tuple[float, ...]
    scale: float  # 1 = no guidance
    renoise: bool  # fresh noise between the steps, as a student; otherwise Euler


def sample_contest(config: EvaluateConfig) -> Comparison:
    """Write the latents of every contestant and seed into OUT/latents.zarr, and OUT/contest.json.

    Sets that are there already, made in the same way from the same weights, are kept.
    """
    setting = open_setting(config)
    if config.select:
        select(setting)
    samplers = [*teachers(setting), *students(setting, [chosen(Path(name)) for name in config.checkpoint])]
    contest = sample_sets(setting, samplers)
    write_comparison(Path(config.out), contest)
    return contest


def open_setting(config: EvaluateConfig) -> Setting:
    """Read the conditions and check that they, the model and the checkpoints belong together."""
    first, *others = config.checkpoint
    facts = read_facts(checkpoints_of(Path(first))[-1])
    if facts.spec.latent_shape[1] < 3:
        raise ValueError(f"checkpoint={first}: {facts.spec.num_frames} frames; a distance needs 9 or more")
    check_model(config.model, facts, ("vae", "transformer"))
    for name in others:
        if read_facts(checkpoints_of(Path(name))[-1]).transformer != facts.transformer:
            raise ValueError(f"checkpoint={name}: distilled from another model than {first}")
    data = open_data_set(config.shards)
    encoders: dict[str, object] = {"vae": facts.vae, "text_encoder": facts.text_encoder}
    check_manifest(Path(config.shards), data.manifest, spec=facts.spec, encoder=encoders)
    count = min(config.count, data.records)
    if count < 2:
        raise ValueError(f"shards={config.shards}: holds {count} records; a distance between sets needs 2 or more")
    made = hashlib.sha256(repr((data.manifest.shards, data.manifest.negative_sha256)).encode()).hexdigest()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_config(Path(config.out) / CONFIG, config)
    return Setting(
        config,
        facts,
        tuple(data.record(index) for index in range(count)),
        pad_text(data.negative, config.text_rows),
        f"{count} of {made}",
        float(str(facts.config["guidance_scale"] if config.guidance_scale is None else config.guidance_scale)),
    )


def checkpoints_of(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, or the one that `folder` is; ValueError where there is none."""
    last = newest(folder)
    return [last] if last == folder else checkpoints(folder)


def teachers(setting: Setting) -> list[Sampler]:
    """The teacher at its many steps and on the student's ladder, and the student as it was before distillation."""
    facts, scale, steps = setting.facts, setting.scale, setting.config.teacher_steps
    many = tuple(shift(1 - step / steps, facts.shift) for step in range(steps))
    few, how = len(facts.sigmas), "guided steps" if scale != 1 else "steps"
    each = 1 if scale == 1 else 2
    return [
        Sampler(Candidate("teacher", f"teacher, {steps} {how}", each * steps, "teacher"), None, many, scale, False),
        Sampler(
            Candidate("teacher-few", f"teacher, {few} {how}", each * few, "teacher-few"),
            None, facts.sigmas, scale, False,
        ),
        Sampler(
            Candidate("undistilled", f"undistilled student, {few} steps", few, "undistilled"),
            None, facts.sigmas, 1.0, True,
        ),
    ]  # fmt: skip


def students(setting: Setting, folders: Sequence[Path]) -> list[Sampler]:
    """Checkpoints, each on its own ladder; the first is named `student`."""
    made: list[Sampler] = []
    for folder in folders:
        facts = read_facts(folder)
        if facts.spec != setting.facts.spec:
            raise ValueError(f"checkpoint={folder}: makes videos of {facts.spec}, the first of {setting.facts.spec}")
        where = folder.resolve()
        short = f"{where.parent.name}-{where.name}"
        label = f"{short}, {len(facts.sigmas)} steps" if made else f"student, {len(facts.sigmas)} steps"
        name = f"{short}-{fingerprint_folder(folder)[:6]}"
        contestant = Candidate(name if made else "student", label, len(facts.sigmas), name)
        if contestant.sets not in [sampler.contestant.sets for sampler in made]:
            made.append(Sampler(contestant, folder, facts.sigmas, 1.0, True))
    return made


def sample_sets(setting: Setting, samplers: Sequence[Sampler]) -> Comparison:
    """Make the sets that are missing, network by network; the first sampler is the teacher."""
    seeds = setting.config.seeds
    contestants = tuple(sampler.contestant for sampler in samplers)
    contest = Comparison(contestants, seeds, references(seeds), len(setting.records), setting.scale)
    for checkpoint in dict.fromkeys(sampler.checkpoint for sampler in samplers):
        todo = []
        for sampler in samplers:
            wanted = {*seeds, *contest.references} if sampler.contestant == contest.teacher else seeds
            if sampler.checkpoint == checkpoint:
                todo += [(sampler, seed) for seed in sorted(wanted) if not is_made(setting, sampler, seed)]
        if todo:
            plain = open_network(setting, checkpoint)
            for sampler, seed in todo:
                sample_set(setting, sampler, plain, seed)
    return contest


def open_network(setting: Setting, checkpoint: Path | None) -> Denoiser:
    """The teacher's or a checkpoint's weights as a function to x0."""
    config, dtype = setting.config, getattr(torch, setting.config.dtype)
    if checkpoint is not None:
        device = pick_device(config.device)
        net = load_student(
            checkpoint,
            read_facts(checkpoint),
            model=config.model,
            weights=config.weights,
            dtype=dtype,
            device=device,
        )
    else:
        net = load_network(locate_model(config.model, ("transformer",)), dtype)
    return denoiser(net.to(pick_device(config.device)).requires_grad_(False), dtype)


def digest(setting: Setting, sampler: Sampler, seed: int) -> str:
    """A digest of all that decides a set's latents."""
    weights = setting.facts.transformer
    if sampler.checkpoint is not None:
        weights = fingerprint_folder(sampler.checkpoint) + setting.config.weights
    how = (sampler.sigmas, sampler.scale, sampler.renoise, setting.config.dtype)
    return hashlib.sha256(repr((weights, how, setting.conditions, seed)).encode()).hexdigest()


def is_made(setting: Setting, sampler: Sampler, seed: int) -> bool:
    """Whether a set is complete and is what would be made now."""
    there = latent_store.read_group_facts(setting.store, latent_set_name(sampler.contestant, seed))
    return there.get("digest") == digest(setting, sampler, seed)


def sample_set(setting: Setting, sampler: Sampler, plain: Denoiser, seed: int) -> None:
    """Sample all conditions with one contestant and seed into the store."""
    records, store, name = setting.records, setting.store, latent_set_name(sampler.contestant, seed)
    keys, prompts = tuple(r.key for r in records), tuple(r.source.prompt for r in records)
    spec = setting.facts.spec
    together = max(1, CHUNK // (4 * math.prod(spec.latent_shape)))
    latent_store.create_group(
        store, latent_store.LatentGroup(name, spec, keys, prompts, (seed,) * len(records)), videos_per_chunk=together
    )
    took = []
    with ProgressBar(len(records), label=f"sample {name}") as progress:
        for rows in group_by_first_frame(records, setting.config.batch_size):
            began = time.perf_counter()
            x0 = sample_rows(setting, sampler, plain, rows, seed).cpu()
            took.append((time.perf_counter() - began) / len(rows))
            if not torch.isfinite(x0).all():
                raise ValueError(f"{sampler.checkpoint or setting.config.model}: makes latents that are not finite")
            latent_store.write_latents(store, name, rows, x0)
            progress.advance(count=len(rows))
    latent_store.finish_group(store, name, facts={"digest": digest(setting, sampler, seed), "seconds": median(took)})


@torch.no_grad()
def sample_rows(setting: Setting, sampler: Sampler, plain: Denoiser, rows: Sequence[int], seed: int) -> Tensor:
    """Latents (B C T H W) of some conditions; the noise depends on the seed and the row alone."""
    device = pick_device(setting.config.device)
    records = [setting.records[row] for row in rows]
    condition: Condition = collate_records(records, text_rows=setting.config.text_rows).condition.to(device)
    draws = [make_generator(seed, 0, row, "evaluate", device) for row in rows]
    noise = draw_normal(setting.facts.spec.latent_shape, draws)
    denoise = guided(plain, negative_text=setting.negative_text.to(device), scale=sampler.scale)
    if sampler.renoise:
        return rollout(denoise, noise, condition, ladder=sampler.sigmas, generators=draws)
    return euler(denoise, noise, condition, sigmas=sampler.sigmas)


def select(setting: Setting) -> Path:
    """Score every checkpoint of the first run by its distance to the teacher; name the best in RUN/best."""
    run = Path(setting.config.checkpoint[0])
    folders = checkpoints_of(run)
    if folders == [run]:
        raise ValueError(f"checkpoint={run}: is one checkpoint; --select chooses among those of a run")
    samplers = students(setting, folders)
    contest = sample_sets(setting, [teachers(setting)[0], *samplers])
    found = score(setting.store, contest)
    distances: dict[str, Spread] = {}
    for folder, sampler in zip(folders, samplers, strict=True):
        distances[folder.name] = spread(found[sampler.contestant.name].frechet)
    best = min(distances, key=lambda name: distances[name].mean)
    rows = [{"checkpoint": name, **vars(distance)} for name, distance in distances.items()]
    write_file(Path(setting.config.out) / SELECTION, (json.dumps(rows, indent=1) + "\n").encode())
    return write_best(run, best, distance=distances[best].mean, iteration=int(best.removeprefix("step-")))
