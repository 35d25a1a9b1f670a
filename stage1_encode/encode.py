"""`encode`: a CSV of clips and prompts becomes a data set. The same command again continues where it stopped."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from common.device import pick_device
from common.model_folder import locate_model
from shards.manifest import MANIFEST_FILE, NEGATIVE_FILE
from stage1_encode.config import EncodeConfig
from stage1_encode.dataset_folder import (
    FAILURES_FILE,
    MANIFEST_BYTE,
    PLAN_BYTE,
    ShardSurvey,
    check_data_set_folder,
    check_plan,
    finish_data_set,
    hold_lock_byte,
    lock_shards,
    make_encoding_plan,
    mark_unfinished,
    open_lock_file,
    read_finished_index,
    report_write_errors,
    survey_shards,
    write_plan,
)
from stage1_encode.executors import EXECUTORS, rank_and_world
from stage1_encode.pipeline import ENCODER_PARTS

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5  # seconds between two looks for the shards of other ranks


class TooManyFailuresError(RuntimeError):
    """The data set is finished, but more of its rows failed than `max_failure_rate` allows."""


@dataclass(frozen=True)
class EncodeReport:
    """What a data set holds after a run."""

    folder: Path
    records: int
    failures: int
    shards: int
    is_complete: bool  # False: shards are missing that are not this run's to make
    first_failure: str = ""  # line, file and reason


def encode(config: EncodeConfig) -> EncodeReport:
    """Make the data set that a configuration describes, or what is missing of it.

    Raises ValueError for the user's mistakes, and `TooManyFailuresError` once the data set is finished.
    """
    folder = Path(config.out)
    if config.retry_failures and rank_and_world()[1] > 1:
        raise ValueError("retry_failures: not under torchrun; use one process, --engine ray, or jobs with --shards")
    if config.engine == "local":
        pick_device(config.device)  # a mistake there comes out before anything is written
    plan = make_encoding_plan(config, locate_model(config.model, ENCODER_PARTS))
    check_data_set_folder(folder)
    check_plan(folder, plan)
    shard_survey = survey_shards(folder, config)
    with open_lock_file(folder) as lock:
        assigned = assigned_shards(config, len(shard_survey.rows))
        lock_shards(lock, folder, assigned)
        shard_rows = {number: shard_survey.rows[number] for number in shard_survey.unfinished if number in assigned}
        embed_negative = (
            0 in assigned and not (folder / NEGATIVE_FILE).is_file()
        )  # one process writes it: the one with shard 0

        def commit_plan() -> None:
            with hold_lock_byte(lock, PLAN_BYTE), report_write_errors(folder):
                check_plan(folder, plan)
                write_plan(folder, config.with_absolute_paths, plan)
                (folder / MANIFEST_FILE).unlink(missing_ok=True)
                if config.retry_failures:
                    mark_unfinished(folder, shard_rows)

        if shard_rows or embed_negative:
            EXECUTORS[config.engine](config, shard_rows, embed_negative=embed_negative, before_writing=commit_plan)
        if rank_and_world()[0] == 0 and config.shard_range == "":
            wait_for_all_shards(folder, shard_survey)
        with hold_lock_byte(lock, MANIFEST_BYTE), report_write_errors(folder):
            manifest = finish_data_set(folder, plan, shard_survey)
    return build_report(config, shard_survey, is_complete=manifest is not None)


def assigned_shards(config: EncodeConfig, shard_count: int) -> range:
    """Numbers of the shards that this process makes, of `shards` in all; none for a job beyond the last one."""
    start, end = config.shard_bounds
    rank, world = rank_and_world()
    if start >= shard_count:
        log.info("shards=%s: the CSV gives shards 0:%d only; nothing to do", config.shard_range, shard_count)
    return range(start, min(shard_count if end is None else end, shard_count))[rank::world]


def wait_for_all_shards(folder: Path, shard_survey: ShardSurvey) -> None:
    """Wait until the shards of all ranks are there; torchrun ends every rank when one dies."""
    missing = list(shard_survey.unfinished)
    while missing:
        missing = [
            number for number in missing if read_finished_index(folder, number, shard_survey.rows[number]) is None
        ]
        if missing:
            time.sleep(POLL_SECONDS)


def build_report(config: EncodeConfig, shard_survey: ShardSurvey, *, is_complete: bool) -> EncodeReport:
    """Say what is there; `TooManyFailuresError` where too many rows failed."""
    folder, rows = Path(config.out), sum(shard_survey.rows)
    indices = [
        index for index in (read_finished_index(folder, number) for number in range(len(shard_survey.rows))) if index
    ]
    records, failures = (
        sum(index.shard.records for index in indices),
        [failure for index in indices for failure in index.failures],
    )
    if is_complete and len(failures) > config.max_failure_rate * rows:
        raise TooManyFailuresError(
            f"{len(failures)} of {rows} rows failed, more than max_failures={config.max_failure_rate:g} allows; "
            f"the reasons are in {folder / FAILURES_FILE}, the other {records} records are in place; "
            "--retry-failures tries the failed rows again"
        )
    first_failure = f"line {failures[0].line}, {failures[0].path}: {failures[0].reason}" if failures else ""
    return EncodeReport(folder, records, len(failures), len(indices), is_complete, first_failure)
