"""Files and folders: written completely or not at all, parsed into typed records, checked before they are used."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

T = TypeVar("T")
# A number of bytes, records or elements. The bound keeps sums of such numbers within 64 bits.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]

URL_PATTERN = re.compile(r"([^/]*)://|(s3|gs|hf):/", re.IGNORECASE)  # s3:/ is what pathlib makes of s3://
UPLOAD_COMMANDS = {"s3": "aws s3 cp --recursive", "gs": "gcloud storage cp -r", "hf": "hf upload"}


def check_local_path(name: str, path: str, *, is_output: bool) -> None:
    """Raise ValueError if an option's path is empty or the address of a store, which would become a local folder."""
    if not path.strip() or "\0" in path:
        raise ValueError(f"{name}={path!r}: is no path; name a file or folder")
    match = URL_PATTERN.match(path)
    if match is None:  # a colon alone is a part of a name
        return
    scheme = (match[1] or match[2] or "").lower()
    if scheme == "file":
        remedy = "give the path without file://"
    elif is_output:
        remedy = f"write into a local folder, then copy it, e.g. with {UPLOAD_COMMANDS.get(scheme, 'rclone copy')}"
    else:
        remedy = "copy it to this machine and give its path"
    raise ValueError(f"{name}={path}: only local files are {'written' if is_output else 'read'}; {remedy}")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file completely or not at all: `.partial`, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the rename, which may reach the disk first
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure; fsync of a file covers its data only."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(data: bytes | memoryview, kind: type[T], where: object) -> T:
    """JSON as a record of type `kind`; ValueError that begins with `where` if it is not one.

    Types, required fields and bounds are those of the record's annotations and `__post_init__`; unknown fields, which
    a newer version may have written, are ignored.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:  # the latter for brackets nested a thousand times
        raise ValueError(f"{where}: is damaged or from another program ({error})") from error


def read_json(path: Path, kind: type[T]) -> T:
    """The JSON file `path` as a record, see `parse_json`; ValueError that names the file if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    return parse_json(data, kind, path)


def refuse_foreign_files(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Raise ValueError if an output folder is a file, or holds names that `is_own` does not accept."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder}: is a file; give a folder")
    foreign = sorted(path.name for path in folder.glob("*") if not is_own(path.name))
    if foreign:
        raise ValueError(f"out={folder}: holds other files ({', '.join(foreign[:3])}); give a new folder")
