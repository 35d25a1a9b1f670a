"""Distances between sets of latents, by a fixed random feature map that needs no download.

Shapes: N videos, B of them at once, C channels, T latent frames, H W latent size, D = 64 features.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from common.progress import ProgressBar
from shards import latent_store
from shards.comparison import Comparison, latent_set_name

RANDOM_FEATURE_SEED, HIDDEN_WIDTH, FEATURE_WIDTH = 20261123, 128, 64  # changing one changes every distance
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 % points, 1..10 degrees
BATCH_BYTES = 2**28  # bytes of latents in memory


def random_weight(out_channels: int, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """A Gaussian convolution weight (out, *shape) that keeps the variance of unit inputs."""
    return torch.randn((out_channels, *shape), generator=generator) / math.sqrt(math.prod(shape))


def latent_features(latents: Tensor) -> Tensor:
    """Features (N D) float32 of latents (N C T H W): two random convolutions of the free frames, averaged."""
    # Drawn on the CPU from a fixed seed, so that the map is the same on every machine.
    generator = torch.Generator().manual_seed(RANDOM_FEATURE_SEED)
    first = random_weight(HIDDEN_WIDTH, (latents.shape[1], 1, 2, 2), generator).to(latents.device)
    second = random_weight(FEATURE_WIDTH, (HIDDEN_WIDTH, 2, 1, 1), generator).to(latents.device)
    hidden = functional.relu(functional.conv3d(latents[:, :, 1:].float(), first))
    return functional.relu(functional.conv3d(hidden, second)).mean(dim=(2, 3, 4))


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


@dataclass
class ScoreSums:
    """What one pass over the store collects, by the name of a set or of a candidate."""

    features: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    to_teacher: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    diversity: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def reference_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """For each seed the one of the teacher's set that it is compared with: the next, or a new one if there are few."""
    # Of two seeds, (1, 0) as references would count one pair of the teacher's sets twice.
    return (*seeds[1:], seeds[0] if len(seeds) > 2 else max(seeds) + 1)


def score_candidates(store: Path, comparison: Comparison) -> dict[str, CandidateScores]:
    """Scores by the names of the candidates, from all N videos."""
    sums = collect_sums(store, comparison)
    sets = {name: torch.cat(parts) for name, parts in sums.features.items()}
    references = [sets[latent_set_name(comparison.teacher, seed)] for seed in comparison.references]
    scores = {}
    for candidate in comparison.contestants:
        names = [latent_set_name(candidate, seed) for seed in comparison.seeds]
        seconds = [latent_store.read_group_facts(store, name).seconds for name in names]
        scores[candidate.name] = CandidateScores(
            tuple(frechet_distance(sets[name], other) for name, other in zip(names, references, strict=True)),
            tuple(sums.to_teacher[name] / comparison.count for name in names),
            sums.diversity[candidate.name] / comparison.count if len(names) > 1 else None,
            sum(seconds) / len(seconds),
        )
    return scores


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
        sums.features[name].append(latent_features(videos))  # small, unlike the latents, which are dropped again
    for candidate in comparison.contestants:
        sets = [rows[latent_set_name(candidate, seed)] for seed in comparison.seeds]
        for videos, seed in zip(sets, comparison.seeds, strict=True):
            teacher_videos = rows[latent_set_name(comparison.teacher, seed)]
            sums.to_teacher[latent_set_name(candidate, seed)] += float(rms_distance(videos, teacher_videos).sum())
        if len(sets) > 1:
            sums.diversity[candidate.name] += float(seed_diversity(sets).sum())
