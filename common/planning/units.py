"""Durations and sizes in words."""

import shutil
from pathlib import Path


def format_hours(hours: float) -> str:
    """A duration in the unit that reads best."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def format_seconds(seconds: float) -> str:
    """A short duration."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def format_count(count: float) -> str:
    """A large number of things."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M")) if count >= size / 2), (1e3, "k"))
    return f"{count / size:.2f} {unit}"


def format_bytes(count: float) -> str:
    """A size in the unit that reads best."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB"))
    return f"{count / size:.1f} {unit}"


def free_bytes(path: Path) -> int:
    """Free bytes of the disk on which a path is, or will be."""
    return shutil.disk_usage(next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())).free
