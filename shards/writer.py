"""Writing one tar shard: completely or not at all, and with the same bytes for the same records.

The sidecar `shard-000007.json` is written after `shard-000007.tar`. It holds the tar's hash, the offsets of its
members, the failures of its CSV rows and a hash of those rows. A shard is finished if both files exist.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import starmap
from pathlib import Path
from types import MappingProxyType

import webdataset

from common.files import Count, parse_json, write_file
from shards.manifest import ShardInfo
from shards.record import METADATA_SUFFIX, TENSORS_SUFFIX, Record, to_members


@dataclass(frozen=True)
class TarMember:
    """The position and the hashes of one member's data in its tar."""

    name: str
    offset: Count  # bytes; the header before the data is not counted
    size: Count  # bytes
    crc32: Count  # of the data; cheap enough to check at every read
    sha256: str  # of the data; checked by verify


@dataclass(frozen=True)
class RowFailure:
    """A CSV row without a record."""

    line: Count
    path: str
    reason: str


@dataclass(frozen=True)
class NoteCount:
    """How many records something is known of that a report should tell."""

    note: str
    records: Count


@dataclass(frozen=True)
class ShardIndex:
    """The sidecar of one shard."""

    shard: ShardInfo
    rows_sha256: str  # of the CSV rows that it covers
    members: tuple[TarMember, ...]  # two per record: KEY.safetensors, then KEY.json
    failures: tuple[RowFailure, ...]
    notes: tuple[NoteCount, ...] = ()  # sorted; the file does not hold an empty tuple


def shard_file_name(number: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def index_file_name(name: str) -> str:
    """File name of the sidecar of the tar `name`."""
    return name.removesuffix(".tar") + ".json"


def write_shard(
    folder: Path,
    name: str,
    records: Iterable[Record],
    *,
    failures: Iterable[RowFailure],
    rows_sha256: str,
    notes: Mapping[str, int] = MappingProxyType({}),
    video_size: tuple[int, int] | None = None,
) -> ShardIndex:
    """Write the tar `name` and its sidecar into `folder` and return the sidecar's content.

    notes: {note: number of records}. video_size: (height, width) if the data set may have several sizes.
    """
    tar_bytes, members = build_tar(records)
    num_records, row_failures = len(members) // 2, tuple(failures)
    num_rows = num_records + len(row_failures)
    tar_sha256 = hashlib.sha256(tar_bytes).hexdigest()
    shard = ShardInfo(name, num_records, num_rows, tar_sha256, len(tar_bytes), video_size=video_size)
    index = ShardIndex(shard, rows_sha256, members, row_failures, tuple(starmap(NoteCount, sorted(notes.items()))))
    fields = {name: value for name, value in asdict(index).items() if name != "notes" or value}
    fields["shard"] = shard.stored_fields
    sidecar = (json.dumps(fields, ensure_ascii=False) + "\n").encode()
    write_file(folder / name, tar_bytes)
    write_file(folder / index_file_name(name), sidecar)
    return parse_index(sidecar, name)


def build_tar(records: Iterable[Record]) -> tuple[memoryview, tuple[TarMember, ...]]:
    """The bytes of a tar of records, and its members."""
    buffer, members = io.BytesIO(), list[TarMember]()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:  # mtime 0, so that equal records = equal bytes
        for record in records:
            for name, data in to_members(record).items():
                key, extension = name.split(".", 1)
                writer.write({"__key__": key, extension: data})
                members.append(TarMember(name, 0, len(data), zlib.crc32(data), hashlib.sha256(data).hexdigest()))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:  # webdataset does not report where it put the data
        offsets = [entry.offset_data for entry in tar]
    located = (replace(member, offset=offset) for member, offset in zip(members, offsets, strict=True))
    return buffer.getbuffer(), tuple(located)


def read_index(folder: Path, name: str) -> ShardIndex | None:
    """The sidecar of the tar `name`; None if the shard is not finished."""
    sidecar = folder / index_file_name(name)
    return parse_index(sidecar.read_bytes(), sidecar) if sidecar.is_file() and (folder / name).is_file() else None


def parse_index(data: bytes | memoryview, where: object) -> ShardIndex:
    """The content of a sidecar, the hash of `data` filled in; ValueError that begins with `where` if it is damaged."""
    index = parse_json(data, ShardIndex, where)
    check_members(index, where)
    return replace(index, shard=replace(index.shard, index_sha256=hashlib.sha256(data).hexdigest()))


def check_members(index: ShardIndex, where: object) -> None:
    """Raise ValueError if the members of a sidecar are not pairs, one per record, in order within the tar."""
    shard, end = index.shard, 0
    if (len(index.members), len(index.failures)) != (2 * shard.records, shard.rows - shard.records):
        raise ValueError(f"{where}: does not describe {shard.records} records of {shard.rows} rows")
    for member in index.members:  # before anything of the stated size is read
        if member.offset < end or member.offset + member.size > shard.size:
            problem = f"{member.size} bytes from {member.offset} on are not between the members of the tar"
            raise ValueError(f"{where}: {member.name}: {problem}")
        end = member.offset + member.size
    for tensors, metadata in zip(index.members[::2], index.members[1::2], strict=True):
        if metadata.name != f"{tensors.name.removesuffix(f'.{TENSORS_SUFFIX}')}.{METADATA_SUFFIX}":
            raise ValueError(f"{where}: {tensors.name} and {metadata.name} are not the two members of a record")
