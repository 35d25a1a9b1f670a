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
from shards.manifest import Manifest, Shard
from shards.record import FACTS, TENSORS, Record, from_members
from shards.storage.open import Place
from shards.writer import Index, Member, index_name, parse_index

BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 24
READS = 3  # of a shard that looks broken: the connection may be at fault


@dataclass(frozen=True)
class Problem:
    """Something broken: the file, and in a tar the member ("" = none in particular)."""

    file: str
    member: str
    reason: str
    shard: str = ""  # the tar to encode again; "" where no shard is at fault

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.member, self.reason) if part)


@dataclass
class Findings:
    """What one shard holds; the arrays have one entry a readable record."""

    shard: Shard
    problems: list[Problem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of the CSV, records' and failures'
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # line, path, reason
    latent_rms: "array[float]" = field(default_factory=lambda: array("f"))  # nan where there is no first frame
    text_rms: "array[float]" = field(default_factory=lambda: array("f"))
    text_rows: "array[int]" = field(default_factory=lambda: array("i"))
    prompt_lengths: "array[int]" = field(default_factory=lambda: array("i"))  # characters
    sources: Counter[str] = field(default_factory=Counter)  # kind and size of the source files

    def blame(self, file: str, member: str, reason: str) -> None:
        """Note a problem that encoding this shard again would mend."""
        self.problems.append(Problem(file, member, reason, self.shard.name))


def examine(place: Place, manifest: Manifest, shard: Shard) -> Findings:
    """Read a whole shard and say what is wrong with it each time."""
    found = _examine_once(place, manifest, shard)
    for _ in range(READS - 1):
        if found.problems:
            found = _examine_once(place, manifest, shard)
    return found


def _examine_once(place: Place, manifest: Manifest, shard: Shard) -> Findings:
    found = Findings(shard)
    index = _examine_sidecar(place, found)
    try:
        if index is not None:
            _examine_tar(place, manifest, index, found)
        elif _hash(place, shard) != shard.sha256:
            found.blame(shard.name, "", "hash differs")
    except OSError as error:
        found.blame(shard.name, "", _cause(error))
    return found


def _cause(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"


def _hash(place: Place, shard: Shard) -> str:
    whole = hashlib.sha256()
    for start in range(0, shard.size, PIECE):
        whole.update(place.read(shard.name, start, min(PIECE, shard.size - start), fresh=True))
    return whole.hexdigest()


def _examine_sidecar(place: Place, found: Findings) -> Index | None:
    shard, name = found.shard, index_name(found.shard.name)
    try:
        index = parse_index(place.read(name, fresh=True))
    except OSError as error:
        found.blame(name, "", _cause(error))
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.blame(name, "", f"is damaged ({error})")
        return None
    if index.shard.index_sha256 != shard.index_sha256:
        found.blame(name, "", "hash differs")
        return None
    if replace(index.shard, index_sha256="") != replace(shard, index_sha256=""):
        found.blame(name, "", "disagrees with the manifest about this shard")
    records, failed = len(index.members) // 2, len(index.failures)
    if records != shard.records or records + failed != shard.rows:
        found.blame(name, "", f"{records} records and {failed} failures do not make {shard.rows} rows")
    found.failures = [(failure.line, failure.path, failure.reason) for failure in index.failures]
    found.lines = [failure.line for failure in index.failures]
    return index


def _examine_tar(place: Place, manifest: Manifest, index: Index, found: Findings) -> None:
    """Hash the tar a record at a time, so that memory holds one record and a bad byte has a name."""
    name, whole, end, suspects, known = found.shard.name, hashlib.sha256(), 0, [], len(found.problems)
    for pair in zip(index.members[::2], index.members[1::2], strict=False):
        data = place.read(name, end, _stop(pair[1]) - end, fresh=True)
        bad = _bad_members(data, end, pair)
        whole.update(data)
        for member, reason in bad.items():
            found.blame(name, member.name, reason)
        if not bad:
            _examine_record(manifest, pair, data, end, found)
        suspects += [member for member, before in zip(pair, (end, _stop(pair[0])), strict=True)
                     if not _is_header(data[before - end : member.offset - end], before, member)]  # fmt: skip
        end = _stop(pair[1])
    whole.update(place.read(name, end, fresh=True))
    if whole.hexdigest() != found.shard.sha256:
        for member in suspects:
            found.blame(name, member.name, "its tar header, or the zeros before that, are damaged")
        if len(found.problems) == known:
            found.blame(name, "", f"is damaged behind its last member, from byte {end} on")


def _stop(member: Member) -> int:
    return member.offset + member.size


def _bad_members(data: bytes, start: int, pair: tuple[Member, Member]) -> dict[Member, str]:
    """What is wrong with the members of a record, in the bytes from `start` on."""
    parts = {member: data[member.offset - start : _stop(member) - start] for member in pair}
    return {
        member: "hash differs" if len(part) == member.size else "is cut off: the tar is too short"
        for member, part in parts.items()
        if hashlib.sha256(part).hexdigest() != member.sha256
    }


def _is_header(between: bytes, start: int, member: Member) -> bool:
    """Whether the bytes before a member, from `start` on, are what a tar writer puts there."""
    try:
        header = tarfile.TarInfo.frombuf(between[-BLOCK:], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    header.name = member.name  # a long one is cut off in this block and stands before it
    return between == bytes(-start % BLOCK) + header.tobuf()


def _examine_record(manifest: Manifest, pair: tuple[Member, Member], data: bytes, start: int, found: Findings) -> None:
    tensors, facts = (data[member.offset - start : member.offset - start + member.size] for member in pair)
    key = pair[0].name.removesuffix(f".{TENSORS}")
    try:
        record = from_members(key, tensors, facts)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        found.blame(found.shard.name, key, f"is no record ({error})")
        return
    if pair[1].name != f"{key}.{FACTS}":
        found.blame(found.shard.name, pair[1].name, f"stands where {key}.{FACTS} should be")
    for reason in record_reasons(record, manifest):
        found.blame(found.shard.name, pair[0].name, reason)
    _measure(record, found)


def record_reasons(record: Record, manifest: Manifest) -> list[str]:
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


def _measure(record: Record, found: Findings) -> None:
    source = record.source
    found.keys.append(record.key)
    found.lines.append(source.line)
    found.latent_rms.append(float("nan") if record.first_frame is None else rms(record.first_frame))
    found.text_rms.append(rms(record.text))
    found.text_rows.append(record.text.shape[0])
    found.prompt_lengths.append(len(source.prompt))
    kind = source.path.rpartition(".")[2].lower() if "." in source.path else "no file"
    found.sources[f"{kind} {source.size[1]}x{source.size[0]}" if source.size else kind] += 1


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.float().square().mean().sqrt())
