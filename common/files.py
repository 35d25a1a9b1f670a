"""Files and folders: written completely or not at all, and checked before they are used."""

import os
from pathlib import Path


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file or nothing: `.partial`, fsync, rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def has_foreign_files(folder: Path, config_name: str) -> bool:
    """Whether a folder without the configuration `name` holds anything but an unfinished one, or is none."""
    if not folder.exists() or (folder / config_name).is_file():
        return False
    return not folder.is_dir() or any(path.name != f"{config_name}.partial" for path in folder.iterdir())
