"""`encode`: a CSV of clips and prompts becomes a data set. The same command again continues where it stopped."""

import logging
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from common.device import pick_device
from common.model_folder import locate_model
from shards.manifest import MANIFEST_FILE, NEGATIVE_FILE
from shards.writer import ShardIndex
from stage1_encode import dataset_folder
from stage1_encode.config import EncodeConfig
from stage1_encode.executors import EXECUTORS, rank_and_world
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.pipeline import ENCODER_PARTS

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5  # between two looks for the shards of other ranks


class TooManyFailuresError(RuntimeError):
    """The data set is finished, but more of its rows failed than `max_failure_rate` allows."""


@dataclass(frozen=True)
class EncodeReport:
    """What a data set holds after a run."""

    folder: Path
    records: int
    failures: int
    shards: int
    is_complete: bool  # False = shards of other jobs are still missing


def encode(config: EncodeConfig) -> EncodeReport:
    """Encode the data set that a configuration describes, or what is missing of it.

    Raises ValueError for mistakes of the user, and `TooManyFailuresError` once the data set is finished.
    """
    folder, assigned = Path(config.out), assigned_shards(config)
    if config.engine == "local":
        pick_device(config.device)  # reports a missing GPU before anything is written
    plan = dataset_folder.make_encoding_plan(config, locate_model(config.model, ENCODER_PARTS))
    dataset_folder.check_data_set_folder(folder)
    dataset_folder.check_plan(folder, plan)
    shards = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=config.text_only)
    shards = chain([next(shards)], shards)  # reports an unusable CSV before the folder is created
    with dataset_folder.open_lock_file(folder) as lock:
        survey = dataset_folder.survey_shards(folder, config, shards, assigned=assigned, lock=lock)
        indices = survey.finished | encode_unfinished(config, plan, survey, embed_negative=0 in assigned, lock=lock)
        finished, is_complete = finish(config, plan, survey.row_counts, indices, lock)
    return build_report(config, finished, total_rows=sum(survey.row_counts), is_complete=is_complete)


def assigned_shards(config: EncodeConfig) -> range:
    """Numbers of the shards that this process encodes, by its rank and `shard_range`; the CSV may have fewer."""
    rank, world = rank_and_world()
    if config.retry_failures and world > 1:
        raise ValueError(
            "retry_failures=True: not under torchrun; use one process, --engine ray, or jobs with --shard-range"
        )
    start, end = config.shard_bounds
    return range(start, sys.maxsize if end is None else end)[rank::world]


def encode_unfinished(
    config: EncodeConfig,
    plan: dataset_folder.EncodingPlan,
    survey: dataset_folder.ShardSurvey,
    *,
    embed_negative: bool,
    lock: int,
) -> dict[int, ShardIndex]:
    """Encode this process's unfinished shards and, if it is missing, the negative prompt; the new sidecars."""
    folder, shard_count = Path(config.out), len(survey.row_counts)
    if config.shard_bounds[0] >= shard_count:
        log.info("shard_range=%s: the CSV gives shards 0:%d only; nothing to do", config.shard_range, shard_count)
    embed_negative = embed_negative and not (folder / NEGATIVE_FILE).is_file()
    if not (survey.unfinished or embed_negative):
        return {}
    with closing(EXECUTORS[config.engine](config, len(survey.unfinished))) as executor:
        executor.load()
        commit_plan(config, plan, survey, lock)  # after the models: one that cannot be read leaves no plan
        if embed_negative:
            executor.embed_negative()
        return executor.run(survey.unfinished)


def commit_plan(
    config: EncodeConfig, plan: dataset_folder.EncodingPlan, survey: dataset_folder.ShardSurvey, lock: int
) -> None:
    """Write the plan of a new data set, and mark the data set as incomplete."""
    folder = Path(config.out)
    with dataset_folder.lock_for_writing(lock, dataset_folder.PLAN_BYTE, folder):
        dataset_folder.check_plan(
            folder, plan
        )  # another job may have begun the data set while this one loaded its models
        dataset_folder.write_plan(folder, config.with_absolute_paths, plan)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        if config.retry_failures:
            dataset_folder.mark_unfinished(folder, survey.unfinished)


def finish(
    config: EncodeConfig,
    plan: dataset_folder.EncodingPlan,
    row_counts: list[int],
    indices: dict[int, ShardIndex],
    lock: int,
) -> tuple[list[ShardIndex], bool]:
    """Complete the data set if no shard is missing; the first rank waits for the shards of the others.

    Returns the sidecars of all finished shards, and whether the data set is complete.
    """
    folder, (rank, world) = Path(config.out), rank_and_world()
    waits = rank == 0 and world > 1 and not config.shard_range
    while True:
        with dataset_folder.lock_for_writing(lock, dataset_folder.MANIFEST_BYTE, folder):
            indices, is_complete = dataset_folder.finish_data_set(folder, plan, row_counts, indices)
        if is_complete or not waits:
            return list(indices.values()), is_complete
        time.sleep(POLL_SECONDS)  # without end: torchrun stops every rank if one dies


def build_report(
    config: EncodeConfig, indices: list[ShardIndex], *, total_rows: int, is_complete: bool
) -> EncodeReport:
    """Count what the sidecars hold; `TooManyFailuresError` if too many of all rows failed."""
    folder, records = Path(config.out), sum(index.shard.records for index in indices)
    failures = sum(len(index.failures) for index in indices)
    if is_complete and failures > config.max_failure_rate * total_rows:
        raise TooManyFailuresError(
            f"{failures} of {total_rows} rows failed, more than max_failure_rate={config.max_failure_rate:g} allows; "
            f"the reasons are in {folder / dataset_folder.FAILURES_FILE}, the other {records} records are in place; "
            "--retry-failures tries the failed rows again"
        )
    return EncodeReport(folder, records, failures, len(indices), is_complete)
