"""Checking one shard byte by byte: its sidecar, the members of its tar, what lies between them, and their records."""

import hashlib
import tarfile
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.video import TEXT_LENGTH
from shards.manifest import Manifest, ShardInfo
from shards.record import METADATA_SUFFIX, TENSORS_SUFFIX, Record, from_members
from shards.storage.open import Storage
from shards.writer import ShardIndex, TarMember, index_file_name, parse_index

BLOCK_BYTES = tarfile.BLOCKSIZE
CHUNK_BYTES = 1 << 24
MAX_READS = 3  # of a shard that looks broken: the connection may be at fault


@dataclass(frozen=True)
class DataProblem:
    """Something broken: the file, and in a tar the member ("" = none in particular)."""

    file: str
    member: str
    reason: str
    shard: str = ""  # the tar to encode again; "" where no shard is at fault

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.member, self.reason) if part)


@dataclass
class ShardReport:
    """What one shard holds; the arrays have one entry a readable record."""

    shard: ShardInfo
    problems: list[DataProblem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of the CSV, records' and failures'
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # line, path, reason
    latent_rms: "array[float]" = field(default_factory=lambda: array("f"))  # nan where there is no first frame
    text_rms: "array[float]" = field(default_factory=lambda: array("f"))
    text_rows: "array[int]" = field(default_factory=lambda: array("i"))
    prompt_lengths: "array[int]" = field(default_factory=lambda: array("i"))  # characters
    sources: Counter[str] = field(default_factory=Counter)  # kind and size of the source files

    def add_problem(self, file: str, member: str, reason: str) -> None:
        """Note a problem that encoding this shard again would mend."""
        self.problems.append(DataProblem(file, member, reason, self.shard.name))


def check_shard(storage: Storage, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    """Read a whole shard and say what is wrong with it each time."""
    report = _check_shard_once(storage, manifest, shard)
    for _ in range(MAX_READS - 1):
        if report.problems:
            report = _check_shard_once(storage, manifest, shard)
    return report


def _check_shard_once(storage: Storage, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    report = ShardReport(shard)
    index = _check_sidecar(storage, report)
    try:
        if index is not None:
            _check_tar(storage, manifest, index, report)
        elif _hash_tar(storage, shard) != shard.sha256:
            report.add_problem(shard.name, "", "hash differs")
    except OSError as error:
        report.add_problem(shard.name, "", _error_reason(error))
    return report


def _error_reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _hash_tar(storage: Storage, shard: ShardInfo) -> str:
    digest = hashlib.sha256()
    for start in range(0, shard.size, CHUNK_BYTES):
        digest.update(storage.read(shard.name, start, min(CHUNK_BYTES, shard.size - start), fresh=True))
    return digest.hexdigest()


def _check_sidecar(storage: Storage, report: ShardReport) -> ShardIndex | None:
    shard, name = report.shard, index_file_name(report.shard.name)
    try:
        index = parse_index(storage.read(name, fresh=True))
    except OSError as error:
        report.add_problem(name, "", _error_reason(error))
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.add_problem(name, "", f"is damaged ({error})")
        return None
    if index.shard.index_sha256 != shard.index_sha256:
        report.add_problem(name, "", "hash differs")
        return None
    if replace(index.shard, index_sha256="") != replace(shard, index_sha256=""):
        report.add_problem(name, "", "disagrees with the manifest about this shard")
    records, failed = len(index.members) // 2, len(index.failures)
    if records != shard.records or records + failed != shard.rows:
        report.add_problem(name, "", f"{records} records and {failed} failures do not make {shard.rows} rows")
    report.failures = [(failure.line, failure.path, failure.reason) for failure in index.failures]
    report.lines = [failure.line for failure in index.failures]
    return index


def _check_tar(storage: Storage, manifest: Manifest, index: ShardIndex, report: ShardReport) -> None:
    """Hash the tar a record at a time, so that memory holds one record and a bad byte has a name."""
    name, digest, end, suspect_members, problems_before = (
        report.shard.name,
        hashlib.sha256(),
        0,
        [],
        len(report.problems),
    )
    for pair in zip(index.members[::2], index.members[1::2], strict=False):
        data = storage.read(name, end, _end_offset(pair[1]) - end, fresh=True)
        bad = _damaged_members(data, end, pair)
        digest.update(data)
        for member, reason in bad.items():
            report.add_problem(name, member.name, reason)
        if not bad:
            _check_record(manifest, pair, data, end, report)
        suspect_members += [member for member, previous_end in zip(pair, (end, _end_offset(pair[0])), strict=True)
                     if not _is_tar_header(data[previous_end - end : member.offset - end], previous_end, member)]  # fmt: skip
        end = _end_offset(pair[1])
    digest.update(storage.read(name, end, fresh=True))
    if digest.hexdigest() != report.shard.sha256:
        for member in suspect_members:
            report.add_problem(name, member.name, "its tar header, or the zeros before that, are damaged")
        if len(report.problems) == problems_before:
            report.add_problem(name, "", f"is damaged behind its last member, from byte {end} on")


def _end_offset(member: TarMember) -> int:
    return member.offset + member.size


def _damaged_members(data: bytes, start: int, pair: tuple[TarMember, TarMember]) -> dict[TarMember, str]:
    """What is wrong with the members of a record, in the bytes from `start` on."""
    parts = {member: data[member.offset - start : _end_offset(member) - start] for member in pair}
    return {
        member: "hash differs" if len(part) == member.size else "is cut off: the tar is too short"
        for member, part in parts.items()
        if hashlib.sha256(part).hexdigest() != member.sha256
    }


def _is_tar_header(preceding: bytes, start: int, member: TarMember) -> bool:
    """Whether the bytes before a member, from `start` on, are what a tar writer puts there."""
    try:
        header = tarfile.TarInfo.frombuf(preceding[-BLOCK_BYTES:], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    header.name = member.name  # a long one is cut off in this block and stands before it
    return preceding == bytes(-start % BLOCK_BYTES) + header.tobuf()


def _check_record(
    manifest: Manifest, pair: tuple[TarMember, TarMember], data: bytes, start: int, report: ShardReport
) -> None:
    tensors, metadata = (data[member.offset - start : member.offset - start + member.size] for member in pair)
    key = pair[0].name.removesuffix(f".{TENSORS_SUFFIX}")
    try:
        record = from_members(key, tensors, metadata)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        report.add_problem(report.shard.name, key, f"is no record ({error})")
        return
    if pair[1].name != f"{key}.{METADATA_SUFFIX}":
        report.add_problem(report.shard.name, pair[1].name, f"stands where {key}.{METADATA_SUFFIX} should be")
    for reason in schema_problems(record, manifest):
        report.add_problem(report.shard.name, pair[0].name, reason)
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
    source = record.source
    report.keys.append(record.key)
    report.lines.append(source.line)
    report.latent_rms.append(float("nan") if record.first_frame is None else root_mean_square(record.first_frame))
    report.text_rms.append(root_mean_square(record.text))
    report.text_rows.append(record.text.shape[0])
    report.prompt_lengths.append(len(source.prompt))
    kind = source.path.rpartition(".")[2].lower() if "." in source.path else "no file"
    report.sources[f"{kind} {source.size[1]}x{source.size[0]}" if source.size else kind] += 1


def root_mean_square(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.float().square().mean().sqrt())
