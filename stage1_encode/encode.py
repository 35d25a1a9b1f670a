"""`encode`: a CSV of clips and prompts becomes a data set. The same command again continues where it stopped."""

import logging
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, starmap
from pathlib import Path

import torch

from common.device import describe_device, pick_device
from common.files import FolderLock, read_json
from common.model_folder import locate_model, locate_part
from common.planning.cards import find_card
from common.planning.codec_cost import TEXT_WIDTH, encode_gib, encode_seconds, record_bytes
from common.planning.units import format_bytes, format_hours, free_bytes
from common.video import FrameSize
from shards.manifest import NEGATIVE_FILE
from shards.writer import NoteCount, ShardIndex
from stage1_encode.config import EncodeConfig
from stage1_encode.dataset_folder import (
    FAILURES_FILE,
    LOCK_FILE,
    DataSetFolder,
    ShardSurvey,
    check_data_set_folder,
    check_plan,
    make_encoding_plan,
)
from stage1_encode.executors import make_executor, rank_and_world
from stage1_encode.imported_latents.latent_source import complete_config, open_source, read_rows
from stage1_encode.media.rows import TooManyFailuresError, count_reasons
from stage1_encode.pipeline import ENCODER_PARTS

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5  # between two looks for the shards of other ranks


@dataclass(frozen=True)
class EncodeReport:
    """What a data set holds after a run."""

    folder: Path
    records: int
    failures: int  # rows without a record
    shards: int  # finished ones
    is_complete: bool  # False = shards of other jobs are still missing
    notes: tuple[NoteCount, ...] = ()  # most frequent first
    reasons: str = ""  # of the failures, with counts


@dataclass(frozen=True)
class TextSettings:
    """What is read of a text encoder's config.json."""

    d_model: int = TEXT_WIDTH


def encode(config: EncodeConfig) -> EncodeReport:
    """Encode the data set that a configuration describes, or what is missing of it.

    Raises ValueError for mistakes of the user, and `TooManyFailuresError` once the data set is finished.
    """
    config = complete_config(config)
    folder, assigned = Path(config.out), assigned_shards(config)
    if config.engine == "local":
        pick_device(config.device)  # reports a missing GPU before anything is written
    plan = make_encoding_plan(config, locate_model(config.model, ENCODER_PARTS))
    check_data_set_folder(folder)
    plan = check_plan(folder, plan)
    rows = read_rows(config, stop_after_failures=config.stop_after_failures)
    rows = chain([next(rows)], rows)  # reports an unusable CSV before the folder is created
    with FolderLock(folder, LOCK_FILE, permanent=True) as lock:
        data_set = DataSetFolder(folder, config, plan, lock)
        survey = data_set.survey_rows(rows, assigned=assigned)
        data_set.restore_options()
        log_start(config, survey)
        began = time.monotonic()
        indices = survey.finished | encode_unfinished(data_set, survey, embed_negative=0 in assigned)
        log_end(config, survey, time.monotonic() - began)
        indices, is_complete = data_set.finish(survey.row_counts, indices)
        while waits_for_ranks(config) and not is_complete:  # torchrun ends this process if another rank dies
            time.sleep(POLL_SECONDS)
            indices, is_complete = data_set.finish(survey.row_counts, indices)
    return build_report(
        config, list(indices.values()), total_rows=sum(survey.row_counts.values()), is_complete=is_complete
    )


def log_start(config: EncodeConfig, survey: ShardSurvey) -> None:
    """Say what is left to encode, on what, what it takes, and how to stop; on the first rank."""
    rank, world = rank_and_world()
    if rank > 0 or not survey.unfinished:
        return
    counts, own = survey.row_counts.values(), sum(map(len, survey.unfinished.values()))
    rows, shards = sum(counts), len(counts)
    share = f" ({own} rows left for this one of {world} ranks)" if world > 1 else ""
    done = f"{len(survey.finished)} finished before"
    log.info("encode: %s, %d rows in %d shards, %s%s", config.data, rows, shards, done, share)
    if survey.size_counts:
        parts = (f"{count} of {size}" for size, count in sorted(survey.size_counts.items()))
        log.info("rows by size (height x width): %s", ", ".join(parts))
    log_device(config, own, world)
    needed = record_bytes(config.largest_spec, read_text_width(config.model)) * own * world
    free = free_bytes(Path(config.out))
    state = "" if free > needed else ": TOO LITTLE, use a larger disk"
    log.info("output: %s, about %s; %s free%s", config.out, format_bytes(needed), format_bytes(free), state)
    log.info("to stop: Ctrl-C or SIGTERM; finished shards stay, and the same command goes on")


def log_device(config: EncodeConfig, rows: int, world: int) -> None:
    """Say on what this process's rows are encoded, and what it takes."""
    if source := open_source(Path(config.data)):
        log.info("latents of %s: they are copied, no model is loaded and no GPU is used", source.program)
        return
    device = None if config.engine == "ray" else pick_device(config.device)
    log.info("on %s", "a Ray cluster" if device is None else f"{world} x {describe_device(device)}")
    if device is not None:
        log.info("%s", describe_cost(config, rows, describe_device(device)))


def describe_cost(config: EncodeConfig, rows: int, device: str) -> str:
    """Predicted time and memory of this process's rows, as `plan` predicts them."""
    card = find_card(device)
    if card is None:
        return f"{rows} rows to encode; this device is not in the table of speeds, so watch the progress"
    seconds = encode_seconds(rows, config.largest_spec, card, gpus=1)
    memory = encode_gib(config.largest_spec, batch_size=config.batch_size, vae_dtype=config.vae_dtype)
    accuracy = "" if card.measured else f" ({card.source})"
    rate = rows / max(seconds, 1e-9)
    return (
        f"{rows} rows to encode: about {rate:.0f}/s, {format_hours(seconds / 3600)}{accuracy}, {memory:.1f} GiB per GPU"
    )


def read_text_width(model: str) -> int:
    """Width of the embeddings of a model's text encoder."""
    settings = locate_part(locate_model(model, ENCODER_PARTS), "text_encoder") / "config.json"
    return read_json(settings, TextSettings).d_model if settings.is_file() else TEXT_WIDTH


def log_end(config: EncodeConfig, survey: ShardSurvey, seconds: float) -> None:
    """Say on the first rank what its rows took."""
    rows = sum(map(len, survey.unfinished.values()))
    if not rows or rank_and_world()[0] > 0:
        return
    on_gpu = config.engine == "local" and pick_device(config.device).type == "cuda"
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
    log.info("%d rows in %s, %.1f rows/s%s", rows, format_hours(seconds / 3600), rows / seconds, peak)


def assigned_shards(config: EncodeConfig) -> range:
    """Numbers of the shards that this process encodes, by its rank and `shard_range`; the CSV may have fewer."""
    rank, world = rank_and_world()
    if config.retry_failures and world > 1:
        raise ValueError(
            "retry_failures=True: not under torchrun; use one process, --engine ray, or jobs with --shard-range"
        )
    start, end = config.shard_bounds
    # The number of shards is known only once the CSV has been read, so the range has no end.
    return range(start, sys.maxsize if end is None else end)[rank::world]


def waits_for_ranks(config: EncodeConfig) -> bool:
    """Whether this process waits for other ranks: the first rank does, unless other jobs have a part of the shards."""
    rank, world = rank_and_world()
    return rank == 0 and world > 1 and not config.shard_range


def encode_unfinished(data_set: DataSetFolder, survey: ShardSurvey, *, embed_negative: bool) -> dict[int, ShardIndex]:
    """Encode this process's unfinished shards and the negative prompt, unless it is embedded; the new sidecars."""
    config, shard_count = data_set.config, len(survey.row_counts)
    if config.shard_bounds[0] >= shard_count:
        log.info("shard_range=%s: the CSV gives shards 0:%d only; nothing to do", config.shard_range, shard_count)
    embed_negative = embed_negative and not (data_set.path / NEGATIVE_FILE).is_file()
    if not (survey.unfinished or embed_negative):
        return {}
    with closing(make_executor(config, len(survey.unfinished))) as executor:
        executor.load()
        data_set.commit_plan(survey)  # after the models: one that cannot be read leaves no plan
        if embed_negative:
            executor.embed_negative()
        return executor.run(survey.unfinished)


def build_report(
    config: EncodeConfig, indices: list[ShardIndex], *, total_rows: int, is_complete: bool
) -> EncodeReport:
    """Count what the sidecars hold; `TooManyFailuresError` if too many of all rows failed."""
    folder, records = Path(config.out), sum(index.shard.records for index in indices)
    all_reasons = [failure.reason for index in indices for failure in index.failures]
    failures, reasons = len(all_reasons), count_reasons(all_reasons)
    if is_complete and failures > config.max_failure_rate * total_rows:
        raise TooManyFailuresError(
            f"{failures} of {total_rows} rows failed, more than max_failure_rate={config.max_failure_rate:g} allows: "
            f"{reasons}; each is listed in {folder / FAILURES_FILE}, the other {records} records are in place; "
            "--retry-failures tries the failed rows again"
        )
    notes = Counter[str]()
    for index in indices:
        if size := index.shard.video_size:
            notes[f"size {FrameSize(*size)}"] += index.shard.records
    for index in indices:
        notes.update({item.note: item.records for item in index.notes})
    counts = tuple(starmap(NoteCount, notes.most_common()))
    return EncodeReport(folder, records, failures, len(indices), is_complete, counts, reasons)
