"""What both doors say of a part of a model folder that is broken, incomplete or something else."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
WAY_OUT = "copy it again, or give a folder like Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def text_width(folder: Path) -> int:
    """Width of the text that the text encoder of a model folder gives."""
    path = folder / "text_encoder" / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["d_model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model={path}: describes no UMT5 text encoder; {WAY_OUT}") from error


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what keeps a library from reading a part of a model into one line with its folder: ValueError."""
    try:
        yield
    except UNREADABLE as error:
        why = re.split(r"\. |\n", str(error))[0]  # diffusers adds how to hide the mistake
        raise ValueError(f"model={folder}: cannot be read: {why}; {WAY_OUT}") from error


def check_weights(folder: Path, found: Mapping[str, Collection[str]]) -> None:
    """Refuse a part that lacks weights, which its library would replace by random ones and go on."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"model={folder}: lacks weights ({', '.join(missing[:3])}); {WAY_OUT}")
