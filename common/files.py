"""Files and folders: written completely or not at all, and output folders checked before they are used."""

import os
from collections.abc import Callable
from pathlib import Path


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


def refuse_foreign_files(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Raise ValueError if an output folder is a file, or holds names that `is_own` does not accept."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder}: is a file; give a folder")
    foreign = sorted(path.name for path in folder.glob("*") if not is_own(path.name))
    if foreign:
        raise ValueError(f"out={folder}: holds other files ({', '.join(foreign[:3])}); give a new folder")
