"""Chooses the best checkpoint of a run, on conditions that the tables of a report do not use."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common.files import write_file
from shards.comparison import Comparison
from stage2_distill.checkpointing import format as checkpoints
from stage2_distill.distributed.process_group import wait_for_ranks
from stage2_distill.evaluation.checkpoint_curve import rise_sentence
from stage2_distill.evaluation.compare import EvaluationSetup, sample_sets, student_samplers, teacher_samplers
from stage2_distill.evaluation.latent_metrics import (
    rank_candidates,
    score_candidates,
    seed_statistics,
    teacher_errors,
)
from stage2_distill.sampling.student_source import find_student

SELECTION_FILE = "selection.json"


@dataclass(frozen=True)
class RankedCheckpoint:
    """One checkpoint of a run on the conditions of one size, or, as a mean, on those of several."""

    rank: float  # mean over the measures, 1 = nearest to the teacher in each
    distance: float  # mean over the seeds


def check_run(checkpoint: str) -> Path:
    """The folder of a run; ValueError if it is that of one checkpoint."""
    run = Path(checkpoint)
    if checkpoints.newest_checkpoint(run) == run:
        raise ValueError(f"checkpoint={run}: is one checkpoint; --select chooses among those of a run")
    return run


def rank_checkpoints(setting: EvaluationSetup) -> dict[str, RankedCheckpoint]:
    """Rank every checkpoint of the first run, by folder name, on the conditions kept for it; writes OUT/selection.json.

    All ranks call this together; only the first one's result is not empty.
    """
    folders = checkpoints.list_checkpoints(check_run(setting.config.checkpoint[0]))
    digest = f"{setting.records_digest}, the {len(setting.selection)} after them"
    other = replace(setting, records=setting.selection, records_digest=digest)
    students = student_samplers(other, [find_student(str(folder), setting.config.model) for folder in folders])
    samplers = [replace(one, sets=f"select-{one.sets}") for one in (teacher_samplers(other)[0], *students)]
    comparison = sample_sets(other, samplers)
    return write_ranks(other, folders, comparison) if setting.rank == 0 else {}


def write_ranks(
    setting: EvaluationSetup, folders: Sequence[Path], comparison: Comparison
) -> dict[str, RankedCheckpoint]:
    """Rank the checkpoints, which are the candidates after the teacher, and write how they compare."""
    scores = score_candidates(setting.store, comparison, device=setting.config.device)
    diversity = scores[comparison.teacher.name].diversity
    ranks = rank_candidates({one.name: scores[one.name] for one in comparison.contestants[1:]}, diversity)
    rows: list[dict[str, Any]] = []
    ranked: dict[str, RankedCheckpoint] = {}
    for (name, rank), folder in zip(ranks.items(), folders, strict=True):
        distance = seed_statistics(scores[name].frechet)
        accuracies = {key: vars(scores[name])[key] for key in ("accuracy_plain", "accuracy")}
        errors = teacher_errors(scores[name], diversity)
        rows.append({"checkpoint": folder.name, **vars(distance), "rank": rank, "errors": errors, **accuracies})
        ranked[folder.name] = RankedCheckpoint(rank, distance.mean)
    logging.info(rise_sentence(rows))
    write_file(Path(setting.config.out) / SELECTION_FILE, (json.dumps(rows, indent=1, default=vars) + "\n").encode())
    return ranked


def mean_over_sizes(rankings: Sequence[Mapping[str, RankedCheckpoint]]) -> dict[str, RankedCheckpoint]:
    """The mean over the sizes: each counts the same, however many records it has."""
    return {
        name: RankedCheckpoint(
            fmean(ranking[name].rank for ranking in rankings), fmean(ranking[name].distance for ranking in rankings)
        )
        for name in rankings[0]
    }


def write_best_checkpoint(run: Path, rankings: Sequence[Mapping[str, RankedCheckpoint]], rank: int) -> None:
    """Write the name of the checkpoint with the best mean rank over the sizes to RUN/best, on the first rank.

    Of equal ranks the smaller mean distance counts, then the earlier checkpoint.
    """
    if rank == 0:
        means = mean_over_sizes(rankings)
        order = [(one.rank, one.distance, checkpoints.iteration_of(run / name), name) for name, one in means.items()]
        _, distance, iteration, best = min(order)
        checkpoints.write_best(run, best, distance=distance, iteration=iteration)
    wait_for_ranks()  # all ranks read the name of the best
