"""The folder of a data set while it is made: what may stand in it, what it is to hold, and who works on it.

`plan.json` names all that changes what a record is, so that a later run continues only what it would have begun.
A run holds a lock on the bytes of `encode.lock` that stand for its shards; the lock ends with its process.
"""

import csv
import fcntl
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.files import refuse_foreign_files, write_file
from common.model_folder import fingerprint_folder
from common.options import write_config
from common.video import VideoSpec
from shards.manifest import (
    MANIFEST_FILE,
    NEGATIVE_FILE,
    SCHEMA_VERSION,
    EncoderInfo,
    Manifest,
    list_differences,
    read_manifest,
    read_negative_embedding,
    write_manifest,
)
from shards.writer import RowFailure, ShardIndex, index_file_name, read_index, shard_file_name
from stage1_encode.config import EncodeConfig
from stage1_encode.media.rows import Row, read_shard_rows, rows_digest
from stage1_encode.models.loading import read_text_width

PLAN_FILE, ENCODE_CONFIG_FILE, FAILURES_FILE, LOCK_FILE = "plan.json", "encode.yaml", "failures.csv", "encode.lock"
DATA_SET_FILES = re.compile(
    rf"({PLAN_FILE}|{ENCODE_CONFIG_FILE}|{FAILURES_FILE}|{LOCK_FILE}|{MANIFEST_FILE}|{NEGATIVE_FILE}|shard-\d{{6,}}\.(tar|json))(\.partial)?"
)
ADDED_FIELDS = ("batch_size", "text_tokens")  # of a plan; those begun before may go on without them
PLAN_BYTE, MANIFEST_BYTE, FIRST_SHARD_BYTE = 0, 1, 2  # bytes of the lock file


@dataclass(frozen=True)
class EncodingPlan:
    """All that changes what a record is, apart from the rows."""

    schema: int
    spec: VideoSpec
    encoder: EncoderInfo
    shard_size: int
    text_only: bool
    compile: bool  # rounds otherwise, and so do the next two
    batch_size: int
    text_tokens: int


@dataclass(frozen=True)
class ShardSurvey:
    """What a CSV asks for, and what of it is not there yet."""

    rows: tuple[int, ...]  # of each shard
    unfinished: tuple[int, ...]  # numbers of shards


def make_encoding_plan(config: EncodeConfig, model: Path) -> EncodingPlan:
    """The plan that a configuration and a model folder amount to."""
    encoder = EncoderInfo(
        vae=fingerprint_folder(model / "vae"),
        text_encoder=fingerprint_folder(model / "text_encoder"),
        tokenizer=fingerprint_folder(model / "tokenizer"),
        vae_dtype=config.vae_dtype,
        text_dtype=config.text_dtype,
        text_dim=read_text_width(model),
        negative_prompt=config.negative_prompt,
    )
    return EncodingPlan(
        schema=SCHEMA_VERSION,
        spec=config.spec,
        encoder=encoder,
        shard_size=config.shard_size,
        text_only=config.text_only,
        compile=config.compile,
        batch_size=config.batch_size,
        text_tokens=config.text_batch_tokens,
    )


def check_data_set_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but a data set."""
    refuse_foreign_files(folder, lambda name: DATA_SET_FILES.fullmatch(name) is not None)


@contextmanager
def open_lock_file(folder: Path) -> Iterator[int]:
    """The folder, made if need be, and its lock file's descriptor; ValueError where it cannot be written."""
    check_data_set_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Turn what keeps a file from being written, a full disk above all, into one clear line: ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}; mend that and run the same command again") from error


@contextmanager
def hold_lock_byte(descriptor: int, offset: int) -> Iterator[None]:
    """Wait for one byte of the lock file and hold it."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, offset)
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, offset)


def lock_shards(descriptor: int, folder: Path, numbers: range) -> None:
    """Hold shards until this process ends; ValueError where another one works on any of them."""
    ranges = [(numbers.start, len(numbers))] if numbers.step == 1 else [(number, 1) for number in numbers]
    for first, count in ranges:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, max(count, 1), FIRST_SHARD_BYTE + first)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"out={folder}: another encode is working on it; wait for it to end") from error


def check_plan(folder: Path, plan: EncodingPlan) -> None:
    """Refuse a folder in which a data set with another plan was begun, naming what differs."""
    path = folder / PLAN_FILE
    if not path.is_file():
        if (folder / shard_file_name(0)).exists():
            raise ValueError(f"out={folder}: holds shards and no {PLAN_FILE}; give a new folder")
        return
    try:
        current = _flatten_fields(json.loads(_plan_to_json(plan)))
        differences = list_differences(
            current, {name: current[name] for name in ADDED_FIELDS} | _flatten_fields(json.loads(path.read_bytes()))
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged; give a new folder") from error
    if differences:
        raise ValueError(f"out={folder}: was begun with other settings: {'; '.join(differences)}; give a new folder")


def write_plan(folder: Path, config: EncodeConfig, plan: EncodingPlan) -> None:
    """Write the plan and the resolved configuration of a new data set."""
    if not (folder / PLAN_FILE).is_file():
        write_config(
            folder / ENCODE_CONFIG_FILE, replace(config, retry_failures=False)
        )  # which is no part of what is made
        write_file(folder / PLAN_FILE, _plan_to_json(plan))


def _plan_to_json(plan: EncodingPlan) -> bytes:
    return (json.dumps(asdict(plan), indent=1, ensure_ascii=False) + "\n").encode()


def _flatten_fields(fields: dict[str, object]) -> dict[str, object]:
    """Nested names joined, as `encoder.vae`."""
    flattened: dict[str, object] = {}
    for name, value in fields.items():
        nested = value if isinstance(value, dict) else None
        flattened |= {name: value} if nested is None else {f"{name}.{key}": item for key, item in nested.items()}
    return flattened


def survey_shards(folder: Path, config: EncodeConfig) -> ShardSurvey:
    """Compare the CSV with the finished shards; ValueError where rows were changed or removed since they were made."""
    counts, unfinished = [], []
    shards = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=config.text_only)
    for number, rows in enumerate(shards):
        index = read_finished_index(folder, number)
        if index is not None:
            _check_rows_unchanged(config, rows, index)
        if index is None or index.shard.rows < len(rows) or (config.retry_failures and index.failures):
            unfinished.append(number)
        counts.append(len(rows))
    if (folder / shard_file_name(len(counts))).exists():
        raise ValueError(f"data={config.data}: has fewer rows than {folder} was made from; give a new folder")
    return ShardSurvey(tuple(counts), tuple(unfinished))


def mark_unfinished(folder: Path, numbers: Iterable[int]) -> None:
    """Make shards unfinished, so that nobody takes them for made before they are made again."""
    for number in numbers:
        (folder / index_file_name(shard_file_name(number))).unlink(missing_ok=True)


def _check_rows_unchanged(config: EncodeConfig, rows: list[Row], index: ShardIndex) -> None:
    if rows_digest(rows[: index.shard.rows]) != index.rows_sha256:
        raise ValueError(
            f"data={config.data}: lines {rows[0].line} to {rows[-1].line} changed since {config.out} was begun; "
            "rows may only be added at the end: undo the change or give a new folder"
        )


def read_finished_index(folder: Path, number: int, rows: int = 0) -> ShardIndex | None:
    """The sidecar of a shard that is there with at least `rows` rows; None where it is to be made (again)."""
    name = shard_file_name(number)
    try:
        index = read_index(folder, name)
    except (ValueError, KeyError, TypeError):  # damaged
        return None
    if index is None or (folder / name).stat().st_size != index.shard.size:
        return None
    return index if index.shard.rows >= rows else None


def finish_data_set(folder: Path, plan: EncodingPlan, shard_survey: ShardSurvey) -> Manifest | None:
    """Write `failures.csv` and the manifest once all shards and the negative prompt are there; None before that."""
    indices = [read_finished_index(folder, number, rows) for number, rows in enumerate(shard_survey.rows)]
    complete_indices = [index for index in indices if index is not None]
    if len(complete_indices) < len(indices) or not (folder / NEGATIVE_FILE).is_file():
        return None
    failures = [failure for index in complete_indices for failure in index.failures]
    manifest = Manifest(
        plan.schema, plan.spec, plan.encoder, tuple(index.shard for index in complete_indices), len(failures)
    )
    if not _is_manifest_written(folder, manifest):
        write_file(folder / FAILURES_FILE, _failures_csv(failures))
        write_manifest(folder, manifest, read_negative_embedding(folder))
    return manifest


def _is_manifest_written(folder: Path, manifest: Manifest) -> bool:
    try:
        written = read_manifest(folder)
    except ValueError:
        return False
    return replace(written, negative_sha256="") == manifest and (folder / FAILURES_FILE).is_file()


def _failures_csv(failures: list[RowFailure]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "path", "reason"])
    writer.writerows([failure.line, failure.path, failure.reason] for failure in failures)
    return text.getvalue().encode()
