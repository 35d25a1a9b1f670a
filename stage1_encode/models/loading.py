"""What both doors say of a part of a model folder that is broken, incomplete or something else."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
MODEL_REMEDY = "copy it again, or give a folder like Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def read_text_width(folder: Path) -> int:
    """Width of the text that the text encoder of a model folder gives."""
    path = folder / "text_encoder" / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["d_model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model={path}: describes no UMT5 text encoder; {MODEL_REMEDY}") from error


@contextmanager
def report_load_errors(folder: Path) -> Iterator[None]:
    """Turn what keeps a library from reading a part of a model into one line with its folder: ValueError."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = re.split(r"\. |\n", str(error))[0]  # diffusers adds how to hide the mistake
        raise ValueError(f"model={folder}: cannot be read: {reason}; {MODEL_REMEDY}") from error


def check_missing_weights(folder: Path, loading_info: Mapping[str, Collection[str]]) -> None:
    """Refuse a part that lacks weights, which its library would replace by random ones and go on."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ValueError(f"model={folder}: lacks weights ({', '.join(missing[:3])}); {MODEL_REMEDY}")
