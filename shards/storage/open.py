"""Where a data set lies: a folder, or an object-store prefix. Nothing that could run a program is ever opened."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from shards.storage.cache import Cache
from shards.storage.object_store import CLIENT_ERRORS, Remote

SCHEMES = tuple(CLIENT_ERRORS)
T = TypeVar("T")


class Place(Protocol):
    """Files by name, below one folder or prefix."""

    where: str

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """`size` bytes of a file from `start` on (None = all); `fresh` = not from a cache. FileNotFoundError."""
        ...

    def fill(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """Read a file's bytes from `start` on into a buffer; zeros where the file ends before."""
        ...


class Folder:
    """A local folder."""

    def __init__(self, where: str) -> None:
        self.where = where

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """See `Place.read`."""
        with (Path(self.where) / name).open("rb", buffering=0) as file:
            wanted = os.fstat(file.fileno()).st_size - start if size is None else size
            file.seek(start)
            return file.read(wanted)

    def fill(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """See `Place.fill`."""
        with (Path(self.where) / name).open("rb", buffering=0) as file:
            file.seek(start)
            there = file.readinto(buffer) or 0
        buffer[there:] = bytes(len(buffer) - there)


def scheme(prefix: str) -> str:
    """The scheme of an object-store prefix, "" for a local folder; ValueError for anything else."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", prefix)
    if found is None and not prefix.startswith("|") and "://" not in prefix:
        return ""
    name = found.group(1).lower() if found else prefix.split(":")[0]
    if name not in SCHEMES or not prefix[len(name) :].startswith("://") or "::" in prefix:
        allowed = ", ".join(f"{known}://" for known in SCHEMES)
        raise ValueError(f"shards={prefix}: {name}: is not read; give a folder or one of {allowed}")
    return name


def cache_folder() -> Path:
    """Where bytes from object stores are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti2v-distill"


def open_place(prefix: str, *, cache_bytes: int) -> Place:
    """A folder, or an object-store prefix of which up to `cache_bytes` are kept on disk; not yet looked at."""
    if scheme(prefix):
        return Remote(prefix, cache=Cache(cache_folder(), cache_bytes))
    return Folder(prefix)


def read_checked(place: Place, name: str, read: Callable[[bool], T], damaged: Callable[[T], list[str]]) -> T:
    """What `read(fresh)` reads of a file, if `damaged` finds nothing to name; a bad read is done once more.

    Raises ValueError naming the file and what is damaged where the second read is bad too.
    """
    bad: list[str] = []
    for fresh in (False, True):
        data = read(fresh)
        bad = damaged(data)
        if not bad:
            return data
    raise ValueError(f"{place.where}/{name}: damaged at {', '.join(bad)} (hash differs, read twice); verify --repair")


def read_whole(place: Place, name: str, sha256: str) -> bytes:
    """A whole small file, its hash checked; see `read_checked`."""

    def damaged(data: bytes) -> list[str]:
        return [] if hashlib.sha256(data).hexdigest() == sha256 else ["the whole file"]

    def read(fresh: bool) -> bytes:
        return place.read(name, fresh=fresh)

    return read_checked(place, name, read, damaged)
