"""Checking files byte by byte: the negative prompt's, or a shard's sidecar, its tar, the members and records."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.video import TEXT_LENGTH
from shards.dataset import read_shard_index
from shards.manifest import NEGATIVE_FILE, Manifest, ShardInfo, load_negative_embedding
from shards.record import METADATA_SUFFIX, TENSORS_SUFFIX, Record, from_members
from shards.storage.open import Storage
from shards.writer import RowFailure, ShardIndex, TarMember, index_file_name

MAX_READS = 3  # of a shard with problems: the connection may be at fault
STATISTICS = ("prompt characters", "text rows", "text rms", "first frame rms")
FORMAT_ERRORS = (ValueError, KeyError, TypeError, AttributeError)  # what parsing bytes of another layout raises


@dataclass(frozen=True)
class DataProblem:
    """Something broken: the file and, in a tar, the member ("" = none in particular)."""

    file: str
    member: str
    reason: str
    shard: str = ""  # the tar to encode again; "" if no shard is at fault

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.member, self.reason) if part)


@dataclass
class ShardReport:
    """The content of one shard; `keys` and each of `values` have one entry per readable record."""

    shard: ShardInfo
    problems: list[DataProblem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of the CSV, records' and failures'
    failures: tuple[RowFailure, ...] = ()
    values: "dict[str, array[float]]" = field(default_factory=lambda: {name: array("f") for name in STATISTICS})
    sources: Counter[str] = field(default_factory=Counter)  # records by kind and size of the source file

    def add_problem(self, file: str, member: str, reason: str) -> None:
        """Note a problem that encoding this shard again repairs."""
        self.problems.append(DataProblem(file, member, reason, self.shard.name))


def negative_problems(storage: Storage, manifest: Manifest) -> Iterator[DataProblem]:
    """The problem of the negative prompt's embedding, if it has one."""
    try:
        negative = load_negative_embedding(storage, manifest)
    except (OSError, ValueError) as error:
        yield DataProblem(NEGATIVE_FILE, "text", str(error))
        return
    if negative.ndim != 2 or negative.shape[1] != manifest.encoder.text_dim or not negative.isfinite().all():
        yield DataProblem(NEGATIVE_FILE, "text", f"is {tuple(negative.shape)}, or holds NaN or infinity")


def check_shard(storage: Storage, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    """Read a whole shard and report its problems; those that a second or third read does not show are ignored."""
    report = _check_shard_once(storage, manifest, shard)
    for _ in range(MAX_READS - 1):
        if report.problems:
            report = _check_shard_once(storage, manifest, shard)
    return report


def _check_shard_once(storage: Storage, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    report, sidecar = ShardReport(shard), index_file_name(shard.name)
    try:
        index = read_shard_index(storage, shard)
    except (OSError, *FORMAT_ERRORS) as error:
        report.add_problem(sidecar, "", _error_reason(error))
        return report
    if (len(index.members), len(index.failures)) != (2 * shard.records, shard.rows - shard.records):
        report.add_problem(sidecar, "", f"does not describe {shard.records} records of {shard.rows} rows")
    report.failures = index.failures
    report.lines = [failure.line for failure in index.failures]
    try:
        _check_tar(storage, manifest, index, report)
    except OSError as error:
        report.add_problem(shard.name, "", _error_reason(error))
    return report


def _error_reason(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _check_tar(storage: Storage, manifest: Manifest, index: ShardIndex, report: ShardReport) -> None:
    """Read the tar one record at a time, so that memory holds one record and damage is attributed to a member."""
    name, digest, end = report.shard.name, hashlib.sha256(), 0
    for pair in zip(index.members[::2], index.members[1::2], strict=False):
        start, end = end, pair[1].offset + pair[1].size
        # Read from the previous end: the headers are covered by the hash of the tar only.
        data = storage.read(name, start, end - start, fresh=True)
        digest.update(data)
        parts = [data[member.offset - start : member.offset - start + member.size] for member in pair]
        hashes = [hashlib.sha256(part).hexdigest() for part in parts]
        damaged = [member.name for member, value in zip(pair, hashes, strict=True) if value != member.sha256]
        for member in damaged:
            report.add_problem(name, member, "hash differs")
        if not damaged:
            _check_record(manifest, pair, parts, report)
    digest.update(storage.read(name, end, fresh=True))
    if digest.hexdigest() != report.shard.sha256 and not report.problems:
        report.add_problem(name, "", "hash differs, outside of the data of its members")


def _check_record(manifest: Manifest, pair: Sequence[TarMember], parts: list[memoryview], report: ShardReport) -> None:
    name, key = report.shard.name, pair[0].name.removesuffix(f".{TENSORS_SUFFIX}")
    try:
        record = from_members(key, *parts)
    except FORMAT_ERRORS as error:
        report.add_problem(name, key, f"is not a record ({error})")
        return
    if pair[1].name != f"{key}.{METADATA_SUFFIX}":
        report.add_problem(name, pair[1].name, f"is where {key}.{METADATA_SUFFIX} must be")
    for reason in schema_problems(record, manifest):
        report.add_problem(name, pair[0].name, reason)
    _add_statistics(record, report)


def schema_problems(record: Record, manifest: Manifest) -> list[str]:
    """What breaks the schema in a record, in words."""
    frame, text = record.first_frame, record.text
    width, shape = manifest.encoder.text_dim, manifest.spec.first_frame_shape
    reasons = []
    if frame is not None and (tuple(frame.shape) != shape or frame.dtype != torch.bfloat16):
        reasons.append(f"first_frame is {tuple(frame.shape)} {frame.dtype}, expected {shape} bfloat16")
    fits = text.ndim == 2 and 1 <= text.shape[0] <= TEXT_LENGTH and text.shape[1] == width
    if not fits or text.dtype != torch.bfloat16:
        reasons.append(f"text is {tuple(text.shape)} {text.dtype}, expected (1..{TEXT_LENGTH}, {width}) bfloat16")
    for name, tensor in (("first_frame", frame), ("text", text)):
        if tensor is not None and not tensor.isfinite().all():
            reasons.append(f"{name} holds NaN or infinity")
    if not record.source.prompt.strip():
        reasons.append("the prompt is empty")
    return reasons


def _add_statistics(record: Record, report: ShardReport) -> None:
    source, frame, text = record.source, record.first_frame, record.text
    report.keys.append(record.key)
    report.lines.append(source.line)
    frame_rms = float("nan") if frame is None else root_mean_square(frame)  # nan keeps the entries of records aligned
    for name, value in zip(STATISTICS, (len(source.prompt), len(text), root_mean_square(text), frame_rms), strict=True):
        report.values[name].append(value)
    kind = source.path.rpartition(".")[2].lower() if "." in source.path else "no file"
    report.sources[f"{kind} {source.size[1]}x{source.size[0]}" if source.size else kind] += 1


def root_mean_square(tensor: Tensor) -> float:
    """Root mean square of all elements."""
    return float(tensor.float().square().mean().sqrt())
