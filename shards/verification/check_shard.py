"""Checking files byte by byte: the negative prompt's, or a shard's sidecar, its tar, the members and records."""

import hashlib
import io
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from tarfile import BLOCKSIZE

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shards.dataset import read_shard_index
from shards.manifest import NEGATIVE_FILE, Manifest, ShardInfo, load_negative_embedding
from shards.record import TENSORS_SUFFIX, Record, from_members, schema_problems
from shards.storage.open import Storage
from shards.writer import RowFailure, ShardIndex, TarMember, index_file_name

MAX_READS = 3  # of a shard with problems: the connection may be at fault
STATISTICS = ("prompt characters", "text rows", "text rms", "first frame rms")
MAX_HEADER_BYTES = 64 * BLOCKSIZE  # of a member with a very long name


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
    notes: Counter[str] = field(default_factory=Counter)  # records by what the sidecar notes of them

    def add_problem(self, file: str, member: str, reason: str) -> None:
        """Note a problem that encoding this shard again repairs."""
        self.problems.append(DataProblem(file, member, reason, self.shard.name))


def negative_problems(storage: Storage, manifest: Manifest) -> Iterator[DataProblem]:
    """The problem of the negative prompt's embedding, if it has one."""
    try:
        load_negative_embedding(storage, manifest)
    except (OSError, ValueError) as error:
        yield DataProblem(NEGATIVE_FILE, "text", str(error))


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
    except (OSError, ValueError) as error:
        report.add_problem(sidecar, "", _error_reason(error))
        return report
    report.failures = index.failures
    report.notes.update({item.note: item.records for item in index.notes})
    report.lines = [failure.line for failure in index.failures]
    try:
        _check_tar(storage, manifest, index, report)
    except (OSError, ValueError) as error:
        report.add_problem(shard.name, "", _error_reason(error))
    return report


def _error_reason(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _check_tar(storage: Storage, manifest: Manifest, index: ShardIndex, report: ShardReport) -> None:
    """Read the tar one record at a time, so that memory holds one record and damage is attributed to a member."""
    name, digest, end = report.shard.name, hashlib.sha256(), 0
    entry_problems = list[DataProblem]()
    for pair in zip(index.members[::2], index.members[1::2], strict=True):
        start, end = end, pair[1].offset + pair[1].size
        # Read from the previous end: the headers are covered by the hash of the tar only.
        data = storage.read(name, start, end - start, fresh=True)
        digest.update(data)
        parts = [data[member.offset - start : member.offset - start + member.size] for member in pair]
        damaged = [
            member.name
            for member, part in zip(pair, parts, strict=True)
            if hashlib.sha256(part).hexdigest() != member.sha256 or zlib.crc32(part) != member.crc32
        ]
        for member in damaged:
            report.add_problem(name, member, "hash differs")
        if not damaged:
            _check_record(manifest, pair, parts, report)
            gaps = data[: pair[0].offset - start], data[pair[0].offset + pair[0].size - start : pair[1].offset - start]
            reasons = [(member.name, entry_problem(gap, member)) for gap, member in zip(gaps, pair, strict=True)]
            entry_problems += [DataProblem(name, *reason, name) for reason in reasons if reason[1]]
    rest = storage.read(name, end, fresh=True)
    digest.update(rest)
    if bytes(rest).strip(b"\0"):
        entry_problems.append(DataProblem(name, "", "holds data after its last member", name))
    if digest.hexdigest() == report.shard.sha256:
        report.problems += entry_problems
    elif not report.problems:  # in damaged headers no entry can be trusted
        report.add_problem(name, "", "hash differs, outside of the data of its members")


def entry_problem(gap: memoryview, member: TarMember) -> str:
    """What is wrong with the bytes before a member's data in a tar: they must be its header alone; "" = nothing.

    Other readers follow links and extract entries that the sidecar does not list, or under other names.
    """
    padding = gap[: len(gap) % BLOCKSIZE]  # of the data before it
    if any(padding) or len(gap) > MAX_HEADER_BYTES:
        return f"{len(gap)} bytes before it are not a header"
    try:
        with tarfile.open(fileobj=io.BytesIO(gap[len(padding) :]), mode="r:") as tar:
            entry = tar.next()
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        return f"its header cannot be read ({error})"
    expected = (member.name, member.size, True, len(gap) - len(padding))
    if entry is None or (entry.name, entry.size, entry.isreg(), entry.offset_data) != expected:
        return f"its header is not that of the file {member.name} of {member.size} bytes"
    return ""


def _check_record(manifest: Manifest, pair: Sequence[TarMember], parts: list[memoryview], report: ShardReport) -> None:
    name, key = report.shard.name, pair[0].name.removesuffix(f".{TENSORS_SUFFIX}")
    try:
        load(bytes(parts[0]))  # the library also refuses tensors that overlap and gaps between them
        record = from_members(key, *parts)
    except (SafetensorError, ValueError) as error:
        report.add_problem(name, key, f"is not a record ({error})")
        return
    shape = manifest.shard_spec(report.shard).first_frame_shape
    reasons = schema_problems(record, shape, manifest.encoder.text_dim)
    for label, tensor in (("first_frame", record.first_frame), ("text", record.text)):
        if tensor is not None and not tensor.isfinite().all():
            reasons.append(f"{label} holds NaN or infinity")
    for reason in reasons:
        report.add_problem(name, pair[0].name, reason)
    if not reasons:
        _add_statistics(record, report)


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
