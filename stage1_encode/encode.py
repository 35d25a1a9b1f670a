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
    FAILURES,
    FINISHING,
    SETTLING,
    Survey,
    alone,
    check_folder,
    check_plan,
    finish,
    finished,
    hold_shards,
    make_plan,
    opened_lock,
    storing,
    survey,
    take_back,
    write_plan,
)
from stage1_encode.executors import ENGINES, rank_and_world
from stage1_encode.pipeline import PARTS

log = logging.getLogger(__name__)
POLL = 0.5  # seconds between two looks for the shards of other ranks


class TooManyFailuresError(RuntimeError):
    """The data set is finished, but more of its rows failed than `max_failures` allows."""


@dataclass(frozen=True)
class EncodeReport:
    """What a data set holds after a run."""

    folder: Path
    records: int
    failures: int
    shards: int
    done: bool  # False: shards are missing that are not this run's to make
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
    plan = make_plan(config, locate_model(config.model, PARTS))
    check_folder(folder)
    check_plan(folder, plan)
    found = survey(folder, config)
    with opened_lock(folder) as lock:
        mine = share(config, len(found.rows))
        hold_shards(lock, folder, mine)
        wanted = {number: found.rows[number] for number in found.unfinished if number in mine}
        negative = 0 in mine and not (folder / NEGATIVE_FILE).is_file()  # one process writes it: the one with shard 0

        def begin() -> None:
            with alone(lock, SETTLING), storing(folder):
                check_plan(folder, plan)
                write_plan(folder, config.anywhere, plan)
                (folder / MANIFEST_FILE).unlink(missing_ok=True)
                if config.retry_failures:
                    take_back(folder, wanted)

        if wanted or negative:
            ENGINES[config.engine](config, wanted, negative=negative, begin=begin)
        if rank_and_world()[0] == 0 and config.shards == "":
            wait_for_others(folder, found)
        with alone(lock, FINISHING), storing(folder):
            manifest = finish(folder, plan, found)
    return report(config, found, done=manifest is not None)


def share(config: EncodeConfig, shards: int) -> range:
    """Numbers of the shards that this process makes, of `shards` in all; none for a job beyond the last one."""
    first, end = config.shard_range
    rank, world = rank_and_world()
    if first >= shards:
        log.info("shards=%s: the CSV gives shards 0:%d only; nothing to do", config.shards, shards)
    return range(first, min(shards if end is None else end, shards))[rank::world]


def wait_for_others(folder: Path, found: Survey) -> None:
    """Wait until the shards of all ranks are there; torchrun ends every rank when one dies."""
    missing = list(found.unfinished)
    while missing:
        missing = [number for number in missing if finished(folder, number, found.rows[number]) is None]
        if missing:
            time.sleep(POLL)


def report(config: EncodeConfig, found: Survey, *, done: bool) -> EncodeReport:
    """Say what is there; `TooManyFailuresError` where too many rows failed."""
    folder, rows = Path(config.out), sum(found.rows)
    there = [index for index in (finished(folder, number) for number in range(len(found.rows))) if index]
    records, failures = sum(index.shard.records for index in there), [f for index in there for f in index.failures]
    if done and len(failures) > config.max_failures * rows:
        raise TooManyFailuresError(
            f"{len(failures)} of {rows} rows failed, more than max_failures={config.max_failures:g} allows; "
            f"the reasons are in {folder / FAILURES}, the other {records} records are in place; "
            "--retry-failures tries the failed rows again"
        )
    first = f"line {failures[0].line}, {failures[0].path}: {failures[0].reason}" if failures else ""
    return EncodeReport(folder, records, len(failures), len(there), done, first)
