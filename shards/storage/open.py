"""Where a data set lies: a folder, or an object-store prefix. Nothing that could run a program is ever opened."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from shards.storage.cache import DiskCache
from shards.storage.object_store import CLIENT_ERRORS, ObjectStore

URL_SCHEMES = tuple(CLIENT_ERRORS)
T = TypeVar("T")


class Storage(Protocol):
    """Files by name, below one folder or prefix."""

    location: str

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """`size` bytes of a file from `start` on (None = all); `fresh` = not from a cache. FileNotFoundError."""
        ...

    def read_into(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """Read a file's bytes from `start` on into a buffer; zeros where the file ends before."""
        ...


class LocalStorage:
    """A local folder."""

    def __init__(self, location: str) -> None:
        self.location = location

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """See `Place.read`."""
        with (Path(self.location) / name).open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size - start if size is None else size
            file.seek(start)
            return file.read(length)

    def read_into(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """See `Place.fill`."""
        with (Path(self.location) / name).open("rb", buffering=0) as file:
            file.seek(start)
            bytes_read = file.readinto(buffer) or 0
        buffer[bytes_read:] = bytes(len(buffer) - bytes_read)


def url_scheme(prefix: str) -> str:
    """The scheme of an object-store prefix, "" for a local folder; ValueError for anything else."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", prefix)
    if match is None and not prefix.startswith("|") and "://" not in prefix:
        return ""
    name = match.group(1).lower() if match else prefix.split(":")[0]
    if name not in URL_SCHEMES or not prefix[len(name) :].startswith("://") or "::" in prefix:
        allowed = ", ".join(f"{allowed_scheme}://" for allowed_scheme in URL_SCHEMES)
        raise ValueError(f"shards={prefix}: {name}: is not read; give a folder or one of {allowed}")
    return name


def cache_folder() -> Path:
    """Where bytes from object stores are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti2v-distill"


def open_storage(prefix: str, *, cache_bytes: int) -> Storage:
    """A folder, or an object-store prefix of which up to `cache_bytes` are kept on disk; not yet looked at."""
    if url_scheme(prefix):
        return ObjectStore(prefix, cache=DiskCache(cache_folder(), cache_bytes))
    return LocalStorage(prefix)


def read_with_retry(
    storage: Storage, name: str, read_bytes: Callable[[bool], T], find_damage: Callable[[T], list[str]]
) -> T:
    """What `read(fresh)` reads of a file, if `damaged` finds nothing to name; a bad read is done once more.

    Raises ValueError naming the file and what is damaged where the second read is bad too.
    """
    damage: list[str] = []
    for fresh in (False, True):
        data = read_bytes(fresh)
        damage = find_damage(data)
        if not damage:
            return data
    raise ValueError(
        f"{storage.location}/{name}: damaged at {', '.join(damage)} (hash differs, read twice); verify --repair"
    )


def read_verified_file(storage: Storage, name: str, sha256: str) -> bytes:
    """A whole small file, its hash checked; see `read_with_retry`."""

    def find_damage(data: bytes) -> list[str]:
        return [] if hashlib.sha256(data).hexdigest() == sha256 else ["the whole file"]

    def read_bytes(fresh: bool) -> bytes:
        return storage.read(name, fresh=fresh)

    return read_with_retry(storage, name, read_bytes, find_damage)
