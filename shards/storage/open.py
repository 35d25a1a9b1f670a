"""Where a data set is stored: a local folder or an object-store prefix, and reading with verified hashes."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy

from common.files import open_file
from shards.storage.cache import DiskCache
from shards.storage.object_store import CLIENT_ERRORS, ObjectStore

MAX_FILE_BYTES = 2**30  # of a file that is read completely: manifest, sidecar and the like
URL_SCHEMES = tuple(CLIENT_ERRORS)


class LocalStorage:
    """Files by name below a local folder."""

    def __init__(self, location: str) -> None:
        self.location = location

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> memoryview:
        """Up to `size` bytes of a file from `start` on (None = all), in writable memory; `fresh` changes nothing."""
        with open_file(Path(self.location) / name) as file:
            available = max(0, os.fstat(file.fileno()).st_size - start)
            if size is None and available > MAX_FILE_BYTES:
                raise ValueError(f"{self.location}/{name}: has {available} bytes; no such file of a data set is read")
            length = available if size is None else min(size, available)  # a stated size may be any number
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
    looks_foreign = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|\|", prefix)  # C:/data does not
    if separator or (looks_foreign and not Path(prefix).is_dir()):  # a folder may be named out-12:30
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


FindDamage = Callable[[memoryview], list[str]]  # names of the damaged parts of the bytes that were read


def read_with_retry(storage: Storage, find_damage: FindDamage, name: str, *byte_range: int) -> memoryview:
    """`storage.read(name, *byte_range)`; ValueError if a second, fresh read is damaged too."""
    data = storage.read(name, *byte_range)
    if find_damage(data):  # perhaps a stale cache or a bad transfer
        data = storage.read(name, *byte_range, fresh=True)
        if damage := find_damage(data):
            problem = f"damaged at {', '.join(damage)} (hash differs, read twice)"
            raise ValueError(f"{storage.location}/{name}: {problem}; run verify --repair")
    return data


def read_verified_file(storage: Storage, name: str, sha256: str) -> memoryview:
    """The bytes of a small file, its hash verified; see `read_with_retry`."""

    def find_damage(data: memoryview) -> list[str]:
        return [] if hashlib.sha256(data).hexdigest() == sha256 else ["the whole file"]

    return read_with_retry(storage, find_damage, name)
