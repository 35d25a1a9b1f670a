"""Measures between sets of latents: distances in several feature maps, ratios of energies, a two-sample test.

Shapes: N videos, B of them at once, C channels, T latent frames, H W latent size, D features.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from common.device import pick_device
from common.progress import ProgressBar
from shards import latent_store
from shards.comparison import Comparison, latent_set_name
from stage2_distill.evaluation.feature_maps import latent_energies, latent_features, spectral_features, tanh_features
from stage2_distill.evaluation.two_sample import NORMAL_95, default_settings, two_sample_accuracy

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points, 1..10 degrees
BATCH_BYTES = 2**28  # bytes of latents in memory
FEATURE_MAPS = (latent_features, tanh_features, spectral_features)  # the first is the distance of earlier versions
MIN_TESTED = 32  # conditions; a classifier trained on fewer finds nothing
WINDOW_ROWS = 16  # videos read at once
MAX_WINDOW = (8, 16, 16)  # T H W of a video that the classifier sees, so that its time does not depend on the size


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to a (N D) and b (M D), in float64 (Dowson & Landau 1982)."""
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding can make zero eigenvalues negative
    # The trace of sqrt(cov_a cov_b), from the symmetric matrix with the same eigenvalues.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@dataclass(frozen=True)
class SeedStatistics:
    """Summary of a metric with one value per seed."""

    mean: float
    deviation: float | None  # standard deviation over the seeds; None = one seed
    low: float | None  # bounds of the 95 % interval of the mean, Student's t
    high: float | None
    values: tuple[float, ...]


def seed_statistics(values: Sequence[float]) -> SeedStatistics:
    """Summarise one value per seed."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return SeedStatistics(mean, None, None, None, tuple(values))
    deviation = statistics.stdev(values)
    half = (STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 2.2) * deviation / math.sqrt(count)
    return SeedStatistics(mean, deviation, mean - half, mean + half, tuple(values))


def accuracy_statistics(answers: Sequence[tuple[float, float, float]]) -> SeedStatistics:
    """Summarise one accuracy and its interval (mean, low, high) per seed of the noise.

    All seeds share the conditions, so the mean of their intervals' widths stays; what the seeds differ by is added.
    """
    found = seed_statistics([mean for mean, _, _ in answers])
    # bounds are cut at 0 and 1, so the wider side is the half width
    halves = [max(mean - low, high - mean) for mean, low, high in answers]
    half = math.hypot(statistics.fmean(halves), NORMAL_95 * (found.deviation or 0.0) / math.sqrt(len(answers)))
    return replace(found, low=max(0.0, found.mean - half), high=min(1.0, found.mean + half))


def rms_distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squared difference (B) of the free frames 1..T-1 of latents a and b (B C T H W)."""
    return (a[:, :, 1:].float() - b[:, :, 1:].float()).square().mean(dim=(1, 2, 3, 4)).sqrt()


def seed_diversity(sets: Sequence[Tensor]) -> Tensor:
    """Mean distance (B) between all pairs of two or more sets (B C T H W): how much the seed changes a video."""
    pairs = [rms_distance(a, b) for index, a in enumerate(sets) for b in sets[:index]]
    return torch.stack(pairs).mean(dim=0)


@dataclass(frozen=True)
class CandidateScores:
    """Metrics of one candidate, one value per seed."""

    frechet: tuple[float, ...]  # to the teacher's set of another seed; the teacher's own is the noise floor
    to_teacher: tuple[float, ...]  # mean distance over the videos, from the same noise
    diversity: float | None  # mean over the videos; None = one seed
    seconds: float  # per video
    tanh_frechet: tuple[float, ...]  # as frechet, in the map of `tanh_features`
    spectral_frechet: tuple[float, ...]  # in the map of `spectral_features`
    sharpness: tuple[float, ...]  # ratios to the teacher's videos of the same conditions and seed
    temporal_variance: tuple[float, ...]
    latent_contrast: tuple[float, ...]
    accuracy: SeedStatistics | None  # of the two-sample test, whitened, as frechet; None = too few conditions
    accuracy_plain: SeedStatistics | None  # of that without whitening, by which candidates are ranked


@dataclass
class ScoreSums:
    """What one pass over the store collects, by the name of a set or of a candidate."""

    features: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=lambda: defaultdict(list))  # per map
    energies: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    to_teacher: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    diversity: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def rank_candidates(scores: Mapping[str, CandidateScores], diversity: float | None) -> dict[str, float]:
    """Mean rank of each candidate over all measures, 1 = nearest to the teacher in every one; `diversity`: its own.

    Distance to the teacher from the same noise is left out: it prefers blur.
    """
    errors = {name: teacher_errors(one, diversity) for name, one in scores.items()}
    ranks = dict.fromkeys(errors, 0.0)
    columns = list(zip(*errors.values(), strict=True))
    for name, values in errors.items():
        for column, value in zip(columns, values, strict=True):
            # equal values share the mean of their ranks
            ranks[name] += sum(other < value for other in column) + (1 + column.count(value)) / 2
    return {name: total / len(columns) for name, total in ranks.items()}


def teacher_errors(scores: CandidateScores, diversity: float | None) -> list[float]:
    """How far a candidate is from the teacher by each measure, 0 = not at all; `diversity` is the teacher's."""
    mean = statistics.fmean
    errors = [mean(scores.frechet), mean(scores.tanh_frechet), mean(scores.spectral_frechet)]
    errors += [abs(mean(one) - 1) for one in (scores.sharpness, scores.temporal_variance, scores.latent_contrast)]
    # Whitened, the test is at its end for every few-step student, so that it would rank by chance.
    if scores.accuracy_plain is not None:
        errors.append(abs(scores.accuracy_plain.mean - 0.5))
    if scores.diversity is not None and diversity:
        errors.append(abs(scores.diversity / diversity - 1))
    return errors


def reference_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """For each seed the one of the teacher's set that it is compared with: the next, or a new one if there are few."""
    # Of two seeds, (1, 0) as references would count one pair of the teacher's sets twice.
    return (*seeds[1:], seeds[0] if len(seeds) > 2 else max(seeds) + 1)


def score_candidates(store: Path, comparison: Comparison, *, device: str = "cpu") -> dict[str, CandidateScores]:
    """Scores of the candidates by name, from all N videos; the classifier runs on `device`, which may be `auto`."""
    sums = collect_sums(store, comparison)
    sets = {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in sums.features.items()}
    energies = {name: torch.cat(parts).mean(dim=0) for name, parts in sums.energies.items()}
    references = [latent_set_name(comparison.teacher, seed) for seed in comparison.references]
    teachers = [latent_set_name(comparison.teacher, seed) for seed in comparison.seeds]
    scores = {}
    for candidate in comparison.contestants:
        names = [latent_set_name(candidate, seed) for seed in comparison.seeds]
        seconds = [latent_store.read_group_facts(store, name).seconds for name in names]
        pairs = list(zip(names, references, strict=True))
        frechet, tanh, spectral = (
            tuple(frechet_distance(sets[name][index], sets[other][index]) for name, other in pairs)
            for index in range(len(FEATURE_MAPS))
        )
        ratios = torch.stack([energies[own] / energies[other] for own, other in zip(names, teachers, strict=True)])
        sharpness, temporal, contrast = (tuple(column.tolist()) for column in ratios.T)
        scores[candidate.name] = CandidateScores(
            frechet,
            tuple(sums.to_teacher[name] / comparison.count for name in names),
            sums.diversity[candidate.name] / comparison.count if len(names) > 1 else None,
            sum(seconds) / len(seconds),
            tanh,
            spectral,
            sharpness,
            temporal,
            contrast,
            *tell_apart(store, comparison, pairs, pick_device(device)),
        )
    return scores


def tell_apart(
    store: Path, comparison: Comparison, pairs: Sequence[tuple[str, str]], device: torch.device
) -> tuple[SeedStatistics | None, SeedStatistics | None]:
    """Accuracies of the two-sample test between each set and its reference, whitened and plain.

    None if there are too few conditions.
    """
    if comparison.count < MIN_TESTED:
        return None, None
    answers: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for (own, other), seed in zip(pairs, comparison.seeds, strict=True):
        one, reference = (read_windows(store, name, comparison.count) for name in (own, other))
        for kind in answers:
            settings = replace(default_settings(device), whiten=kind)
            found = two_sample_accuracy(one, reference, seeds=(seed,), device=device, settings=settings)
            answers[kind].append((found.mean, found.low, found.high))
    return accuracy_statistics(answers[True]), accuracy_statistics(answers[False])


def read_windows(store: Path, name: str, count: int) -> Tensor:
    """The first frames and the centre (N C T H W) of a set's videos, as much as the classifier sees."""
    parts = []
    for start in range(0, count, WINDOW_ROWS):
        videos = latent_store.read_latent_rows(store, name, start, min(start + WINDOW_ROWS, count))
        frames, height, width = (min(size, limit) for size, limit in zip(videos.shape[2:], MAX_WINDOW, strict=True))
        top, left = (videos.shape[3] - height) // 2, (videos.shape[4] - width) // 2
        parts.append(videos[:, :, :frames, top : top + height, left : left + width].clone())
    return torch.cat(parts)


def collect_sums(store: Path, comparison: Comparison) -> ScoreSums:
    """Read every set once, the same few rows of all sets at a time."""
    candidates, seeds = comparison.contestants, comparison.seeds
    # The teacher's references may be sets of its own seeds: each name counts once.
    references = [latent_set_name(comparison.teacher, seed) for seed in comparison.references]
    names = {*references, *(latent_set_name(candidate, seed) for candidate in candidates for seed in seeds)}
    sums, video_bytes = ScoreSums(), latent_store.read_latents(store, references[0], 0).nbytes
    step = max(1, BATCH_BYTES // (len(names) * video_bytes))
    with ProgressBar(comparison.count, label="compare latents") as progress:
        for start in range(0, comparison.count, step):
            stop = min(start + step, comparison.count)
            add_rows(sums, comparison, {n: latent_store.read_latent_rows(store, n, start, stop) for n in names})
            progress.advance(count=stop - start)
    return sums


def add_rows(sums: ScoreSums, comparison: Comparison, rows: dict[str, Tensor]) -> None:
    """Add some rows (B C T H W) of every set."""
    for name, videos in rows.items():
        # small, unlike the latents, which are dropped again
        sums.features[name].append(tuple(feature_map(videos) for feature_map in FEATURE_MAPS))
        sums.energies[name].append(latent_energies(videos))
    for candidate in comparison.contestants:
        sets = [rows[latent_set_name(candidate, seed)] for seed in comparison.seeds]
        for videos, seed in zip(sets, comparison.seeds, strict=True):
            teacher_videos = rows[latent_set_name(comparison.teacher, seed)]
            sums.to_teacher[latent_set_name(candidate, seed)] += float(rms_distance(videos, teacher_videos).sum())
        if len(sets) > 1:
            sums.diversity[candidate.name] += float(seed_diversity(sets).sum())
