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
from stage2_distill.checkpointing.format import (
    StudentFacts,
    list_checkpoints,
    newest_checkpoint,
    read_facts,
    resolve_checkpoint,
    write_best,
)
from stage2_distill.dmd.rollout import rollout, sample_euler
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import SeedStatistics, reference_seeds, score_candidates, seed_statistics
from stage2_distill.model.wan import guided, make_denoiser
from stage2_distill.model.wan import load_transformer as load_network
from stage2_distill.sampling.student_sampler import check_model, load_student

EVALUATION_CONFIG_FILE, SELECTION_FILE = "evaluate.yaml", "selection.json"
CHUNK_BYTES = 4 << 20  # bytes of latents that share a chunk of the store


@dataclass(frozen=True)
class EvaluationSetup:
    """What all contestants share."""

    config: EvaluateConfig
    facts: StudentFacts  # of the first checkpoint
    records: tuple[Record, ...]  # N
    negative_text: Tensor  # (L D)
    records_digest: str  # digest of the records
    guidance_scale: float

    @property
    def store(self) -> Path:
        """Where the latents go."""
        return Path(self.config.out) / LATENTS_STORE


@dataclass(frozen=True)
class CandidateSampler:
    """How one contestant makes its videos."""

    candidate: Candidate
    checkpoint: Path | None  # None: the teacher's weights
    sigmas: tuple[float, ...]
    guidance_scale: float  # 1 = no guidance
    renoise: bool  # fresh noise between the steps, as a student; otherwise Euler


def sample_comparison(config: EvaluateConfig) -> Comparison:
    """Write the latents of every contestant and seed into OUT/latents.zarr, and OUT/contest.json.

    Sets that are there already, made in the same way from the same weights, are kept.
    """
    setting = open_evaluation(config)
    if config.select:
        select_best(setting)
    samplers = [
        *teacher_samplers(setting),
        *student_samplers(setting, [resolve_checkpoint(Path(name)) for name in config.checkpoint]),
    ]
    comparison = sample_sets(setting, samplers)
    write_comparison(Path(config.out), comparison)
    return comparison


def open_evaluation(config: EvaluateConfig) -> EvaluationSetup:
    """Read the conditions and check that they, the model and the checkpoints belong together."""
    first, *other_runs = config.checkpoint
    facts = read_facts(run_checkpoints(Path(first))[-1])
    if facts.spec.latent_shape[1] < 3:
        raise ValueError(f"checkpoint={first}: {facts.spec.num_frames} frames; a distance needs 9 or more")
    check_model(config.model, facts, ("vae", "transformer"))
    for name in other_runs:
        if read_facts(run_checkpoints(Path(name))[-1]).transformer != facts.transformer:
            raise ValueError(f"checkpoint={name}: distilled from another model than {first}")
    data = open_data_set(config.shards)
    encoders: dict[str, object] = {"vae": facts.vae, "text_encoder": facts.text_encoder}
    check_manifest(Path(config.shards), data.manifest, spec=facts.spec, encoder=encoders)
    count = min(config.num_records, data.num_records)
    if count < 2:
        raise ValueError(f"shards={config.shards}: holds {count} records; a distance between sets needs 2 or more")
    data_digest = hashlib.sha256(repr((data.manifest.shards, data.manifest.negative_sha256)).encode()).hexdigest()
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_config(Path(config.out) / EVALUATION_CONFIG_FILE, config)
    return EvaluationSetup(
        config,
        facts,
        tuple(data.read_record(index) for index in range(count)),
        pad_text(data.negative, config.max_text_tokens),
        f"{count} of {data_digest}",
        float(str(facts.config["guidance_scale"] if config.guidance_scale is None else config.guidance_scale)),
    )


def run_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, or the one that `folder` is; ValueError where there is none."""
    last = newest_checkpoint(folder)
    return [last] if last == folder else list_checkpoints(folder)


def teacher_samplers(setting: EvaluationSetup) -> list[CandidateSampler]:
    """The teacher at its many steps and on the student's ladder, and the student as it was before distillation."""
    facts, scale, steps = setting.facts, setting.guidance_scale, setting.config.teacher_steps
    teacher_sigmas = tuple(shift(1 - step / steps, facts.shift) for step in range(steps))
    student_steps, step_label = len(facts.sigmas), "guided steps" if scale != 1 else "steps"
    evaluations_per_step = 1 if scale == 1 else 2
    return [
        CandidateSampler(Candidate("teacher", f"teacher, {steps} {step_label}", evaluations_per_step * steps, "teacher"), None, teacher_sigmas, scale, False),
        CandidateSampler(
            Candidate("teacher-few", f"teacher, {student_steps} {step_label}", evaluations_per_step * student_steps, "teacher-few"),
            None, facts.sigmas, scale, False,
        ),
        CandidateSampler(
            Candidate("undistilled", f"undistilled student, {student_steps} steps", student_steps, "undistilled"),
            None, facts.sigmas, 1.0, True,
        ),
    ]  # fmt: skip


def student_samplers(setting: EvaluationSetup, folders: Sequence[Path]) -> list[CandidateSampler]:
    """Checkpoints, each on its own ladder; the first is named `student`."""
    samplers: list[CandidateSampler] = []
    for folder in folders:
        facts = read_facts(folder)
        if facts.spec != setting.facts.spec:
            raise ValueError(f"checkpoint={folder}: makes videos of {facts.spec}, the first of {setting.facts.spec}")
        resolved = folder.resolve()
        short_name = f"{resolved.parent.name}-{resolved.name}"
        label = f"{short_name}, {len(facts.sigmas)} steps" if samplers else f"student, {len(facts.sigmas)} steps"
        name = f"{short_name}-{fingerprint_folder(folder)[:6]}"
        candidate = Candidate(name if samplers else "student", label, len(facts.sigmas), name)
        if candidate.sets not in [sampler.candidate.sets for sampler in samplers]:
            samplers.append(CandidateSampler(candidate, folder, facts.sigmas, 1.0, True))
    return samplers


def sample_sets(setting: EvaluationSetup, samplers: Sequence[CandidateSampler]) -> Comparison:
    """Make the sets that are missing, network by network; the first sampler is the teacher."""
    seeds = setting.config.seeds
    candidates = tuple(sampler.candidate for sampler in samplers)
    comparison = Comparison(candidates, seeds, reference_seeds(seeds), len(setting.records), setting.guidance_scale)
    for checkpoint in dict.fromkeys(sampler.checkpoint for sampler in samplers):
        missing = []
        for sampler in samplers:
            needed_seeds = {*seeds, *comparison.references} if sampler.candidate == comparison.teacher else seeds
            if sampler.checkpoint == checkpoint:
                missing += [
                    (sampler, seed) for seed in sorted(needed_seeds) if not is_current_set(setting, sampler, seed)
                ]
        if missing:
            denoiser = open_denoiser(setting, checkpoint)
            for sampler, seed in missing:
                sample_set(setting, sampler, denoiser, seed)
    return comparison


def open_denoiser(setting: EvaluationSetup, checkpoint: Path | None) -> Denoiser:
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
    return make_denoiser(net.to(pick_device(config.device)).requires_grad_(False), dtype)


def set_digest(setting: EvaluationSetup, sampler: CandidateSampler, seed: int) -> str:
    """A digest of all that decides a set's latents."""
    weights = setting.facts.transformer
    if sampler.checkpoint is not None:
        weights = fingerprint_folder(sampler.checkpoint) + setting.config.weights
    settings = (sampler.sigmas, sampler.guidance_scale, sampler.renoise, setting.config.dtype)
    return hashlib.sha256(repr((weights, settings, setting.records_digest, seed)).encode()).hexdigest()


def is_current_set(setting: EvaluationSetup, sampler: CandidateSampler, seed: int) -> bool:
    """Whether a set is complete and is what would be made now."""
    stored = latent_store.read_group_facts(setting.store, latent_set_name(sampler.candidate, seed))
    return stored.get("digest") == set_digest(setting, sampler, seed)


def sample_set(setting: EvaluationSetup, sampler: CandidateSampler, denoiser: Denoiser, seed: int) -> None:
    """Sample all conditions with one contestant and seed into the store."""
    records, store, name = setting.records, setting.store, latent_set_name(sampler.candidate, seed)
    keys, prompts = tuple(r.key for r in records), tuple(r.source.prompt for r in records)
    spec = setting.facts.spec
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * math.prod(spec.latent_shape)))
    latent_store.create_group(
        store,
        latent_store.LatentGroup(name, spec, keys, prompts, (seed,) * len(records)),
        videos_per_chunk=rows_per_chunk,
    )
    seconds = []
    with ProgressBar(len(records), label=f"sample {name}") as progress:
        for rows in group_by_first_frame(records, setting.config.batch_size):
            start_time = time.perf_counter()
            x0 = sample_rows(setting, sampler, denoiser, rows, seed).cpu()
            seconds.append((time.perf_counter() - start_time) / len(rows))
            if not torch.isfinite(x0).all():
                raise ValueError(f"{sampler.checkpoint or setting.config.model}: makes latents that are not finite")
            latent_store.write_latents(store, name, rows, x0)
            progress.advance(count=len(rows))
    latent_store.finish_group(
        store, name, facts={"digest": set_digest(setting, sampler, seed), "seconds": median(seconds)}
    )


@torch.no_grad()
def sample_rows(
    setting: EvaluationSetup, sampler: CandidateSampler, denoiser: Denoiser, rows: Sequence[int], seed: int
) -> Tensor:
    """Latents (B C T H W) of some conditions; the noise depends on the seed and the row alone."""
    device = pick_device(setting.config.device)
    records = [setting.records[row] for row in rows]
    condition: Condition = collate_records(records, max_text_tokens=setting.config.max_text_tokens).condition.to(device)
    generators = [make_generator(seed, 0, row, "evaluate", device) for row in rows]
    noise = draw_normal(setting.facts.spec.latent_shape, generators)
    guided_denoiser = guided(denoiser, negative_text=setting.negative_text.to(device), scale=sampler.guidance_scale)
    if sampler.renoise:
        return rollout(guided_denoiser, noise, condition, sigmas=sampler.sigmas, generators=generators)
    return sample_euler(guided_denoiser, noise, condition, sigmas=sampler.sigmas)


def select_best(setting: EvaluationSetup) -> Path:
    """Score every checkpoint of the first run by its distance to the teacher; name the best in RUN/best."""
    run = Path(setting.config.checkpoint[0])
    folders = run_checkpoints(run)
    if folders == [run]:
        raise ValueError(f"checkpoint={run}: is one checkpoint; --select chooses among those of a run")
    samplers = student_samplers(setting, folders)
    comparison = sample_sets(setting, [teacher_samplers(setting)[0], *samplers])
    scores = score_candidates(setting.store, comparison)
    distances: dict[str, SeedStatistics] = {}
    for folder, sampler in zip(folders, samplers, strict=True):
        distances[folder.name] = seed_statistics(scores[sampler.candidate.name].frechet)
    best = min(distances, key=lambda name: distances[name].mean)
    rows = [{"checkpoint": name, **vars(distance)} for name, distance in distances.items()]
    write_file(Path(setting.config.out) / SELECTION_FILE, (json.dumps(rows, indent=1) + "\n").encode())
    return write_best(run, best, distance=distances[best].mean, iteration=int(best.removeprefix("step-")))
