"""Compares students with their teacher: every candidate samples the same conditions from the same noise.

Shapes: N records, B batch, C channels, T latent frames, H W latent size, L text rows, D text width.
"""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from common.condition import Denoiser
from common.device import pick_device
from common.model_folder import digest_files, locate_model
from common.progress import ProgressBar
from common.seed import draw_normal, make_generator
from common.video import FrameSize, VideoSpec
from shards import latent_store
from shards.comparison import LATENTS_STORE, Candidate, Comparison, latent_set_name, write_comparison
from shards.dataset import DataSet, SizeGroup, open_data_set
from shards.manifest import check_settings
from shards.record import Record, collate_records, group_by_first_frame, pad_text
from stage2_distill.checkpointing import format as checkpoints
from stage2_distill.checkpointing.identity import option_texts
from stage2_distill.config import EXACT, FP8
from stage2_distill.distributed.process_group import rank_and_world, wait_for_ranks
from stage2_distill.dmd.rollout import sample_euler, sample_student
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import reference_seeds
from stage2_distill.low_precision.fp8_support import check_fp8, store_weights_in_fp8
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.wan import build_meta_transformer, guided, make_denoiser
from stage2_distill.sampling.student_sampler import load_student
from stage2_distill.sampling.student_source import StudentSource, check_model, find_student
from stage2_distill.sampling.teacher_sampler import load_teacher, teacher_guidance, teacher_sigmas
from stage2_distill.weight_files.lora_files import split_weight

CHUNK_BYTES = 4 << 20  # bytes of latents that share a chunk of the store
MIN_LATENT_FRAMES = 3  # the feature map spans two free frames
MIN_RECORDS, MIN_SELECT_RECORDS = 2, 8  # of a size; --select uses others than the table


@dataclass(frozen=True)
class EvaluationSetup:
    """What all candidates share."""

    config: EvaluateConfig
    facts: checkpoints.StudentFacts  # of the first checkpoint
    records: tuple[Record, ...]  # N, the conditions of the final table
    selection: tuple[Record, ...]  # other conditions, by which --select ranks; none without it
    negative_text: Tensor  # (L D)
    records_digest: str
    guidance_scale: float
    store: Path  # zarr store of all latents
    rank: int  # this process samples every world-th batch, starting with its rank
    world: int


@dataclass(frozen=True)
class CandidateSampler:
    """How one candidate samples its videos."""

    name: str
    title: str  # the label without the number of steps
    sets: str  # prefix of its sets' names
    sigmas: tuple[float, ...]
    guidance_scale: float = 1.0  # 1 = no guidance
    renoise: bool = True  # fresh noise between the steps, as a student; False = Euler steps
    source: StudentSource | None = None  # None = the teacher's weights

    @property
    def candidate(self) -> Candidate:
        """The candidate, with its label and its number of network evaluations per video."""
        steps, is_guided = len(self.sigmas), self.guidance_scale != 1
        label = f"{self.title}, {steps} {'guided steps' if is_guided else 'steps'}"
        return Candidate(self.name, label, steps * (2 if is_guided else 1), self.sets)


def sample_comparison(setting: EvaluationSetup) -> Comparison:
    """Write the latents of every candidate and seed into OUT/latents.zarr, and OUT/contest.json.

    Complete sets from the same weights and settings are kept. All ranks call this together, and share each set.
    """
    config, spec = setting.config, setting.facts.spec
    students = student_samplers(setting, [find_student(name, config.model, spec=spec) for name in config.checkpoint])
    comparison = sample_sets(setting, [*teacher_samplers(setting), *students])
    if setting.rank == 0:
        write_comparison(Path(config.out), comparison)
    return comparison


def open_evaluation(config: EvaluateConfig) -> EvaluationSetup:
    """Read the conditions; ValueError if they, the model and the checkpoints do not belong together."""
    data = open_data_set(config.shards)
    (group,) = find_size_groups(config, data)  # the caller names one of several
    first, *others = (find_student(name, config.model, spec=group.spec, best=False).facts for name in config.checkpoint)
    first = facts_of_size(config, first, group.spec)
    if first.spec.latent_shape[1] < MIN_LATENT_FRAMES:
        frames = first.spec.num_frames
        raise ValueError(f"checkpoint={config.checkpoint[0]}: {frames} frames; a distance needs 9 or more")
    check_model(config.model, first, ("vae", "transformer"))
    if config.precision == FP8:  # before the teacher samples for hours
        net = build_meta_transformer(locate_model(config.model, ("transformer",)), getattr(torch, config.dtype))
        check_fp8(net, pick_device(config.device))
    for name, facts in zip(config.checkpoint[1:], others, strict=True):
        check_model(config.model, facts, ("transformer",))
        if teacher_weights(facts) != teacher_weights(first):
            raise ValueError(f"checkpoint={name}: its teacher has other base_lora files than the first; compare apart")
    expected = {"vae": first.vae, "text_encoder": first.text_encoder, "fps": first.spec.fps}
    check_settings(config.shards, data.manifest, expected)
    count = min(config.num_records, group.num_records)
    if count < MIN_RECORDS:
        raise ValueError(f"shards={config.shards}: holds {count} records; a distance between sets needs 2 or more")
    data_digest = hashlib.sha256(repr((data.manifest.shards, data.manifest.negative_sha256)).encode()).hexdigest()
    count, selected = split_records(group.num_records, count) if config.select else (count, 0)
    records = tuple(data.read_record(group.record_index(index)) for index in range(count + selected))
    negative_text, store = pad_text(data.negative, config.max_text_tokens), Path(config.out) / LATENTS_STORE
    scale = teacher_guidance(first, config.guidance_scale)
    digest, ranks = f"{count} of {data_digest}", rank_and_world()
    if len(data.size_groups) > 1 or config.num_frames is not None:  # else stays as it was, and so do stored sets
        digest += f" {first.spec}"
    parts = records[:count], records[count:]
    return EvaluationSetup(config, first, *parts, negative_text, digest, scale, store, *ranks)


def split_records(total: int, count: int) -> tuple[int, int]:
    """Number of records of the final table, the first ones, and of --select, those after them.

    A checkpoint that is chosen on the table's own conditions would look better there than it is. ValueError if there
    are too few records for both.
    """
    selected = min(count, max(total - count, total // 4))
    if total < MIN_SELECT_RECORDS:
        raise ValueError(
            f"select: the data set has {total} records; --select needs {MIN_SELECT_RECORDS} or more, as it uses others"
        )
    count = min(count, total - selected)
    logging.info("--select ranks by %d other records; the table is made on the first %d", selected, count)
    return count, selected


def list_record_sizes(config: EvaluateConfig) -> tuple[FrameSize, ...]:
    """The sizes that are compared, each apart: that of the options, or all of the data set with enough records."""
    data = open_data_set(config.shards)
    chosen = find_size_groups(config, data)
    for group in () if config.size else data.size_groups:
        if group not in chosen:
            size, count = group.spec.frame_size, group.num_records
            logging.warning("evaluate: %s is left out, as it has too few records: %d", size, count)
    return tuple(group.spec.frame_size for group in chosen)


def find_size_groups(config: EvaluateConfig, data: DataSet) -> tuple[SizeGroup, ...]:
    """The records of the size of the options, or of all sizes that have enough; ValueError if none has the size."""
    if config.frame_size is None:
        needed = MIN_SELECT_RECORDS if config.select else MIN_RECORDS
        enough = tuple(group for group in data.size_groups if group.num_records >= needed)
        return enough or (max(data.size_groups, key=lambda group: group.num_records),)  # which is then refused
    chosen = tuple(group for group in data.size_groups if group.spec.frame_size == config.frame_size)
    if not chosen:
        listed = ", ".join(str(group.spec.frame_size) for group in data.size_groups)
        raise ValueError(f"size={config.size}: the records of {config.shards} have {listed}; give one of them")
    return chosen


def facts_of_size(config: EvaluateConfig, facts: checkpoints.StudentFacts, spec: VideoSpec) -> checkpoints.StudentFacts:
    """A student's facts with the size of the records, and the length of the options, as its own.

    ValueError if it was not trained on them.
    """
    wanted = replace(spec, num_frames=facts.spec.num_frames if config.num_frames is None else config.num_frames)
    if not makes_videos(facts, wanted):
        sizes, lengths = ", ".join(map(str, facts.frame_sizes)), ", ".join(map(str, facts.frame_counts))
        raise ValueError(
            f"checkpoint={config.checkpoint[0]}: was trained on {lengths} frames of {sizes} at "
            f"{facts.spec.fps} per second, and the records are {wanted.num_frames} frames of {wanted.frame_size} at "
            f"{wanted.fps}; give others with --shards, --size or --num-frames"
        )
    return replace(facts, spec=wanted)


def makes_videos(facts: checkpoints.StudentFacts, spec: VideoSpec) -> bool:
    """Whether a student was trained on videos of this shape."""
    is_known = spec.frame_size in facts.frame_sizes and spec.num_frames in facts.frame_counts
    return is_known and spec.fps == facts.spec.fps


def teacher_samplers(setting: EvaluationSetup) -> list[CandidateSampler]:
    """The teacher at its many steps and at the student's, and the student as it was before distillation.

    With `controls` also the teacher without guidance, if it has one.
    """
    facts, scale, steps = setting.facts, setting.guidance_scale, setting.config.teacher_steps
    sigmas = teacher_sigmas(facts, steps)
    unguided = CandidateSampler("teacher-unguided", "teacher, no guidance", "teacher-unguided", sigmas, renoise=False)
    controls = [unguided] if setting.config.controls and scale != 1 else []
    return [
        CandidateSampler("teacher", "teacher", "teacher", sigmas, scale, renoise=False),
        CandidateSampler("teacher-few", "teacher", "teacher-few", facts.sigmas, scale, renoise=False),
        CandidateSampler("undistilled", "undistilled student", "undistilled", facts.sigmas),
        *controls,
    ]


def student_samplers(setting: EvaluationSetup, sources: Sequence[StudentSource]) -> list[CandidateSampler]:
    """Students, each with its own sigmas, without duplicates; the first is named `student`."""
    samplers: list[CandidateSampler] = []
    for source in sources:
        facts, path = source.facts, source.own_path
        if not makes_videos(facts, setting.facts.spec):
            raise ValueError(
                f"checkpoint={path}: makes videos of {facts.spec}, the first of {setting.facts.spec}; compare apart"
            )
        resolved = path.resolve()
        title = f"{resolved.parent.name}-{resolved.name}"
        sets = f"{title}-{digest_files(path)[:6]}"  # runs in different places may have the same name
        name, title = (sets, title) if samplers else ("student", "student")
        if sets not in [sampler.sets for sampler in samplers]:
            samplers.append(CandidateSampler(name, title, sets, facts.sigmas, source=source))
    return samplers


def sample_sets(setting: EvaluationSetup, samplers: Sequence[CandidateSampler]) -> Comparison:
    """Sample the missing sets, one network after another; the first sampler is the teacher."""
    seeds, references = setting.config.seeds, reference_seeds(setting.config.seeds)
    candidates = tuple(sampler.candidate for sampler in samplers)
    pairs = [(samplers[0], seed) for seed in sorted({*seeds, *references})]
    pairs += [(sampler, seed) for sampler in samplers[1:] for seed in sorted(seeds)]
    missing = [pair for pair in pairs if not is_set_usable(setting, *pair)]
    wait_for_ranks()  # all have looked before the first one writes
    for source, group in groupby(missing, key=lambda pair: pair[0].source):
        denoiser = open_denoiser(setting, source)
        for sampler, seed in group:
            sample_set(setting, sampler, denoiser, seed)
    return Comparison(candidates, seeds, references, len(setting.records), setting.guidance_scale)


def is_set_usable(setting: EvaluationSetup, sampler: CandidateSampler, seed: int) -> bool:
    """Whether a set in the store is complete and from the same weights and settings; damage is logged."""
    name = latent_set_name(sampler.candidate, seed)
    if not (setting.store / name).is_dir():
        return False
    damage = latent_store.group_damage(setting.store, name)
    if damage is not None:
        logging.warning("%s; the set %s is sampled again", damage, name)
        return False
    return latent_store.read_group_facts(setting.store, name).digest == set_digest(setting, sampler, seed)


def open_denoiser(setting: EvaluationSetup, source: StudentSource | None) -> Denoiser:
    """The weights of a student, or of the teacher, as a function to x0."""
    config = setting.config
    dtype, device = getattr(torch, config.dtype), pick_device(config.device)
    if source is None:
        net = load_teacher(config.model, setting.facts, dtype=dtype, device=device)
    else:
        net = load_student(
            source.path, ExecutionPlan(), model=config.model, weights=config.weights, dtype=dtype, device=device,
            loras=source.loras,
        )  # fmt: skip
        if config.precision == FP8:
            store_weights_in_fp8(net)
    return make_denoiser(net, dtype)


def teacher_weights(facts: checkpoints.StudentFacts) -> str:
    """What the teacher's weights are: the fingerprint of the base, and the LoRA files that were added to it."""
    weights = [split_weight(text).weight for text in option_texts(facts.config.get("base_lora") or ())]
    return f"{facts.transformer} {facts.base_loras} {weights}" if weights else facts.transformer


def set_digest(setting: EvaluationSetup, sampler: CandidateSampler, seed: int) -> str:
    """Digest of everything that decides a set's latents."""
    weights = teacher_weights(setting.facts)
    if sampler.source is not None:
        precision = setting.config.precision
        weights = digest_files(sampler.source.own_path) + setting.config.weights + precision.removeprefix(EXACT)
    settings = (sampler.sigmas, sampler.guidance_scale, sampler.renoise, setting.config.dtype)
    return hashlib.sha256(repr((weights, settings, setting.records_digest, seed)).encode()).hexdigest()


def sample_set(setting: EvaluationSetup, sampler: CandidateSampler, denoiser: Denoiser, seed: int) -> None:
    """Sample all conditions with one candidate and seed into the store; each rank samples its share of the batches."""
    records, store, name = setting.records, setting.store, latent_set_name(sampler.candidate, seed)
    rank, world = setting.rank, setting.world
    keys, prompts = tuple(r.key for r in records), tuple(r.source.prompt for r in records)
    group = latent_store.LatentGroup(name, setting.facts.spec, keys, prompts, (seed,) * len(records))
    video_bytes = 4 * math.prod(group.spec.latent_shape)  # float32
    if rank == 0:  # a chunk has one writer
        chunk = 1 if world > 1 else max(1, CHUNK_BYTES // video_bytes)
        latent_store.create_group(store, group, videos_per_chunk=chunk)
    wait_for_ranks()
    seconds = []  # per video; their median leaves out the first batch, which is slower
    batches = list(group_by_first_frame(records, setting.config.batch_size))[rank::world]
    with ProgressBar(sum(map(len, batches)), label=f"sample {name}", quiet=rank > 0) as progress:
        for rows in batches:
            start_time = time.perf_counter()  # `.cpu()` below waits for the GPU
            x0 = sample_rows(setting, sampler, denoiser, rows, seed).cpu()
            seconds.append((time.perf_counter() - start_time) / len(rows))
            if not torch.isfinite(x0).all():
                path = sampler.source.own_path if sampler.source else setting.config.model
                raise ValueError(f"{path}: makes latents that are not finite; take an earlier checkpoint")
            latent_store.write_latents(store, name, rows, x0)
            progress.advance(count=len(rows))
    wait_for_ranks()
    if rank == 0:  # which has the first batch
        facts = latent_store.SetFacts(set_digest(setting, sampler, seed), median(seconds))
        latent_store.finish_group(store, name, facts=facts)


@torch.no_grad()
def sample_rows(
    setting: EvaluationSetup, sampler: CandidateSampler, denoiser: Denoiser, rows: Sequence[int], seed: int
) -> Tensor:
    """Latents (B C T H W) of some conditions."""
    device, sigmas, shape = pick_device(setting.config.device), sampler.sigmas, setting.facts.spec.latent_shape
    records = [setting.records[row] for row in rows]
    condition = collate_records(records, max_text_tokens=setting.config.max_text_tokens).to(device)
    guided_denoiser = guided(denoiser, negative_text=setting.negative_text.to(device), scale=sampler.guidance_scale)
    # Noise depends on the seed and the row alone: candidates share it, whatever their batch.
    keys, purpose = [(seed, 0, row) for row in rows], "evaluate"
    if sampler.renoise:
        return sample_student(guided_denoiser, condition, sigmas=sigmas, latent_shape=shape, keys=keys, purpose=purpose)
    noise = draw_normal(shape, [make_generator(*key, purpose, device) for key in keys])
    return sample_euler(guided_denoiser, noise, condition, sigmas=sigmas)
