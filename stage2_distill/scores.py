"""What the latents of a contest say: distances between sets, to the teacher on the same noise, and over the seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.progress import Progress
from shards import latents
from shards.contest import Contest, set_name
from stage2_distill.metrics import distance, diversity, features, frechet

AT_ONCE = 2**28  # bytes of latents in memory


@dataclass(frozen=True)
class Scores:
    """Figures of one contestant, one a seed."""

    frechet: tuple[float, ...]  # to the teacher's set of another seed; for the teacher itself this is the floor
    to_teacher: tuple[float, ...]  # mean over the videos, on the same noise
    diversity: float | None  # mean over the videos; None with one seed
    seconds: float  # a video


@dataclass
class Sums:
    """What one pass over the store collects, by the name of a set or of a contestant."""

    features: dict[str, list[Tensor]]
    to_teacher: dict[str, float]
    diversity: dict[str, float]


def references(seeds: Sequence[int]) -> tuple[int, ...]:
    """For each seed the one whose teacher set it is measured against: the next, with a further one if there are few."""
    return (*seeds[1:], seeds[0] if len(seeds) > 2 else max(seeds) + 1)


def score(store: Path, contest: Contest) -> dict[str, Scores]:
    """Scores by the contestants' names, of all N videos."""
    sums = collect(store, contest)
    sets = {name: torch.cat(parts) for name, parts in sums.features.items()}
    found = {}
    for contestant in contest.contestants:
        names = [set_name(contestant, seed) for seed in contest.seeds]
        against = [set_name(contest.teacher, seed) for seed in contest.references]
        seconds = [float(latents.facts(store, name)["seconds"]) for name in names]
        found[contestant.name] = Scores(
            tuple(frechet(sets[mine], sets[other]) for mine, other in zip(names, against, strict=True)),
            tuple(sums.to_teacher[name] / contest.count for name in names),
            sums.diversity[contestant.name] / contest.count if len(names) > 1 else None,
            sum(seconds) / len(seconds),
        )
    return found


def set_names(contest: Contest) -> list[str]:
    """Every set of a contest, the teacher's references included."""
    further = [set_name(contest.teacher, seed) for seed in contest.references]
    own = [set_name(contestant, seed) for contestant in contest.contestants for seed in contest.seeds]
    return list(dict.fromkeys([*own, *further]))


def collect(store: Path, contest: Contest) -> Sums:
    """Read every set once, some rows of all of them at a time."""
    names = set_names(contest)
    sums = Sums({name: [] for name in names}, dict.fromkeys(names, 0.0), {c.name: 0.0 for c in contest.contestants})
    video = latents.read(store, names[0], 0)
    step = max(1, AT_ONCE // (len(names) * video.nbytes))
    with Progress(contest.count, label="compare latents") as progress:
        for start in range(0, contest.count, step):
            stop = min(start + step, contest.count)
            add_rows(sums, contest, {name: latents.read_rows(store, name, start, stop) for name in names})
            progress.advance(count=stop - start)
    return sums


def add_rows(sums: Sums, contest: Contest, rows: dict[str, Tensor]) -> None:
    """Add some rows (B C T H W) of every set."""
    for name, videos in rows.items():
        sums.features[name].append(features(videos))
    for contestant in contest.contestants:
        sets = [rows[set_name(contestant, seed)] for seed in contest.seeds]
        for videos, seed in zip(sets, contest.seeds, strict=True):
            same_noise = rows[set_name(contest.teacher, seed)]
            sums.to_teacher[set_name(contestant, seed)] += float(distance(videos, same_noise).sum())
        if len(sets) > 1:
            sums.diversity[contestant.name] += float(diversity(sets).sum())
