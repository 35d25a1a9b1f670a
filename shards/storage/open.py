"""Where a data set is stored: a local folder or an object-store prefix, and reading with verified hashes."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy

from shards.storage.cache import DiskCache
from shards.storage.object_store import CLIENT_ERRORS, ObjectStore

URL_SCHEMES = tuple(CLIENT_ERRORS)
T = TypeVar("T")


class LocalStorage:
    """Files by name below a local folder."""

    def __init__(self, location: str) -> None:
        self.location = location

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> memoryview:
        """Up to `size` bytes of a file from `start` on (None = all), in writable memory; `fresh` changes nothing."""
        with (Path(self.location) / name).open("rb", buffering=0) as file:
            length = max(0, os.fstat(file.fileno()).st_size - start) if size is None else size
            buffer = numpy.empty(length, numpy.uint8).data  # unlike a bytearray, not zeroed before it is filled
            file.seek(start)
            return buffer[: file.readinto(buffer)]


Storage = LocalStorage | ObjectStore


def url_scheme(prefix: str) -> str:
    """The scheme of an object-store prefix, "" for a local folder; ValueError for anything else."""
    # fsspec also knows schemes that run programs or are chained by `::`, so only those listed are accepted.
    scheme, separator, _ = prefix.partition("://")
    if separator and scheme.lower() in URL_SCHEMES and "::" not in prefix:
        return scheme.lower()
    if separator or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|\|", prefix):  # C:/data is a folder
        allowed = ", ".join(f"{scheme}://" for scheme in URL_SCHEMES)
        raise ValueError(f"shards={prefix}: cannot be read; give a folder or one of {allowed}")
    return ""


def cache_folder() -> Path:
    """The folder for bytes from object stores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti2v-distill"


def open_storage(prefix: str, *, cache_bytes: int) -> Storage:
    """A folder, or an object-store prefix of which up to `cache_bytes` are kept on disk; nothing is read yet."""
    if url_scheme(prefix):
        return ObjectStore(prefix, cache=DiskCache(cache_folder(), cache_bytes))
    return LocalStorage(prefix)


def read_with_retry(
    storage: Storage, name: str, read_bytes: Callable[[bool], T], find_damage: Callable[[T], list[str]]
) -> T:
    """What `read_bytes(fresh)` reads; ValueError if `find_damage` names damaged parts even of a second, fresh read."""
    data = read_bytes(False)
    if find_damage(data):  # perhaps a stale cache or a bad transfer
        data = read_bytes(True)
        if damage := find_damage(data):
            problem = f"damaged at {', '.join(damage)} (hash differs, read twice)"
            raise ValueError(f"{storage.location}/{name}: {problem}; run verify --repair")
    return data


def read_verified_file(storage: Storage, name: str, sha256: str) -> memoryview:
    """The bytes of a small file, its hash verified; see `read_with_retry`."""

    def find_damage(data: memoryview) -> list[str]:
        return [] if hashlib.sha256(data).hexdigest() == sha256 else ["the whole file"]

    return read_with_retry(storage, name, lambda fresh: storage.read(name, fresh=fresh), find_damage)
