"""Data sets changed under right hashes, as somebody would who wants a reader to fail."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.manifest import ZERO_HASH

SHARD, SIDECAR = "shard-000000.tar", "shard-000000.json"
Entry = tuple[tarfile.TarInfo, bytes]
Json = dict[str, Any]


def sign_manifest(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the manifest and give it the right hash."""
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    fields.pop("sha256", None)
    text = json.dumps({"sha256": ZERO_HASH} | fields, indent=1) + "\n"
    signed = text.replace(ZERO_HASH, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 1)
    (folder / "manifest.json").write_bytes(signed.encode("utf-8", "surrogatepass"))


def sign_sidecar(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the first sidecar and give it the right hash in the manifest."""
    fields = json.loads((folder / SIDECAR).read_text())
    change(fields)
    sign_sidecar_bytes(folder, json.dumps(fields).encode())


def sign_sidecar_bytes(folder: Path, data: bytes) -> None:
    """Replace the first sidecar by any bytes under the right hash."""
    (folder / SIDECAR).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    sign_manifest(folder, lambda fields: fields["shards"][0].update(index_sha256=digest))


def read_entries(folder: Path) -> list[Entry]:
    """The entries of the first tar."""
    with tarfile.open(folder / SHARD) as tar:
        return [(entry, tar.extractfile(entry).read()) for entry in tar]


def sign_tar(folder: Path, entries: list[Entry], *, listed: Callable[[tarfile.TarInfo], bool] = lambda _: True) -> None:
    """Write the first tar anew with these entries; sidecar and manifest have the right hashes of those `listed`."""
    buffer, members = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in entries:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
            offset = buffer.tell() - len(data) - (-len(data) % tarfile.BLOCKSIZE)
            facts = {"crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
            if listed(entry):
                members.append({"name": entry.name, "offset": offset, "size": len(data)} | facts)
    sign_tar_bytes(folder, buffer.getvalue(), members)


def sign_tar_bytes(folder: Path, data: bytes, members: list[Json]) -> None:
    """Replace the first tar by any bytes under right hashes."""
    (folder / SHARD).write_bytes(data)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    sign_manifest(folder, lambda fields: fields["shards"][0].update(facts))
    sign_sidecar(folder, lambda fields: (fields["shard"].update(facts), fields.update(members=members)))


def sign_member(folder: Path, number: int, data: bytes) -> None:
    """Replace the data of one member of the first tar under right hashes."""
    entries = read_entries(folder)
    entries[number] = (entries[number][0], data)
    sign_tar(folder, entries)
