"""Where a data set lies: a folder, or an object-store prefix. Nothing that could run a program is ever opened."""

import os
import re
from pathlib import Path
from typing import Protocol

SCHEMES = ("https", "http", "s3", "gs", "hf")


class Place(Protocol):
    """Files by name, below one folder or prefix."""

    where: str

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """`size` bytes of a file from `start` on (None = all); `fresh` = not from a cache. FileNotFoundError."""
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


def open_place(prefix: str) -> Place:
    """A folder or an object-store prefix, not yet looked at."""
    if scheme(prefix):
        raise ValueError(f"shards={prefix}: object stores are not read yet")
    return Folder(prefix)
