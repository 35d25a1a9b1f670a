"""Writing one tar shard: whole or not at all, and the same bytes for the same records.

Beside `shard-000007.tar` stands `shard-000007.json`, written after it: the tar's hash, the offsets of its members,
the failures of its rows, and a hash of those rows. A shard is finished where both are there.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import webdataset

from common.files import write_file
from shards.manifest import ShardInfo
from shards.record import Record, to_members


@dataclass(frozen=True)
class TarMember:
    """Where one member's bytes lie in its tar."""

    name: str
    offset: int
    size: int
    crc32: int  # of the data; cheap enough to check at every read
    sha256: str


@dataclass(frozen=True)
class RowFailure:
    """A CSV row that gave no record."""

    line: int
    path: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """The sidecar of one shard."""

    shard: ShardInfo
    rows_sha256: str  # of the CSV rows that it stands for
    members: tuple[TarMember, ...]  # two a record, KEY.safetensors then KEY.json
    failures: tuple[RowFailure, ...]


def shard_file_name(number: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def index_file_name(name: str) -> str:
    """File name of the sidecar of the tar `name`."""
    return name.removesuffix(".tar") + ".json"


def index_path(folder: Path, name: str) -> Path:
    """Path of the sidecar of the tar `name`."""
    return folder / index_file_name(name)


def write_shard(
    folder: Path, name: str, records: Iterable[Record], *, failures: Iterable[RowFailure], rows_sha256: str
) -> ShardIndex:
    """Write `name` and its sidecar into `folder` and return the sidecar's content."""
    buffer = io.BytesIO()
    members: list[TarMember] = []
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
        for record in records:
            for member, data in to_members(record).items():
                key, extension = member.split(".", 1)
                tar.write({"__key__": key, extension: data})
                members.append(TarMember(member, 0, len(data), zlib.crc32(data), hashlib.sha256(data).hexdigest()))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        offsets = [info.offset_data for info in tar]
    tar_bytes = buffer.getbuffer()
    located_members = tuple(replace(item, offset=offset) for item, offset in zip(members, offsets, strict=True))
    row_failures = tuple(failures)
    count = len(located_members) // 2
    shard = ShardInfo(name, count, count + len(row_failures), hashlib.sha256(tar_bytes).hexdigest(), len(tar_bytes))
    index = ShardIndex(shard, rows_sha256, located_members, row_failures)
    write_file(folder / name, tar_bytes)
    sidecar = (json.dumps(asdict(index), ensure_ascii=False) + "\n").encode()
    write_file(index_path(folder, name), sidecar)
    return parse_index(sidecar)


def read_index(folder: Path, name: str) -> ShardIndex | None:
    """The sidecar of a finished shard; None where the shard is not finished."""
    sidecar, tar = index_path(folder, name), folder / name
    if not sidecar.is_file() or not tar.is_file():
        return None
    return parse_index(sidecar.read_bytes())


def parse_index(data: bytes) -> ShardIndex:
    """The content of a sidecar, its own hash added to the shard's facts."""
    fields = json.loads(data)
    return ShardIndex(
        replace(ShardInfo(**fields["shard"]), index_sha256=hashlib.sha256(data).hexdigest()),
        fields["rows_sha256"],
        tuple(TarMember(**member) for member in fields["members"]),
        tuple(RowFailure(**failure) for failure in fields["failures"]),
    )
