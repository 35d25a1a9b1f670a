"""Errors of the VAE and text encoder loaders for a broken, incomplete or different model folder."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# what diffusers, transformers and safetensors raise for broken files, as far as seen
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
MODEL_REMEDY = "copy it again, or give a folder like Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def read_text_width(folder: Path) -> int:
    """Return the embedding width from the config.json of a text encoder; ValueError if it is not a UMT5."""
    path = folder / "text_encoder" / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["d_model"])  # without loading the weights
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model={path}: does not describe a UMT5 text encoder; {MODEL_REMEDY}") from error


@contextmanager
def report_load_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of a library that reads `folder` into a ValueError of one line that names the folder."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = re.split(r"\. |\n", str(error))[0]  # diffusers appends advice on ignoring the error
        raise ValueError(f"model={folder}: cannot be read: {reason}; {MODEL_REMEDY}") from error


def check_missing_weights(folder: Path, loading_info: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError if weights are missing: the libraries only warn, and continue with random ones."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ValueError(f"model={folder}: lacks weights ({', '.join(missing[:3])}); {MODEL_REMEDY}")
