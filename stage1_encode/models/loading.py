"""Errors of the VAE and text encoder loaders for a broken, incomplete or different model folder."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import Count, read_json
from common.model_folder import MODEL_REMEDY, locate_part
from stage1_encode.models.original_models import TEXT_NAMES, infer_text_settings, read_original_tensors


@dataclass(frozen=True)
class TextEncoderConfig:
    """What is needed of a text encoder's config.json before its weights are loaded."""

    d_model: Count


def read_text_width(folder: Path) -> int:
    """Return the embedding width of a text encoder, which is not loaded; ValueError if it is not a UMT5."""
    original = locate_part(folder, "text_encoder")
    if original.is_file():
        tensors = read_original_tensors(original, TEXT_NAMES)
        return int(infer_text_settings(original, tensors)["d_model"])
    path = folder / "text_encoder" / "config.json"
    try:
        return read_json(path, TextEncoderConfig).d_model
    except ValueError as error:
        raise ValueError(f"model={path}: does not describe a UMT5 text encoder; {MODEL_REMEDY}") from error


def check_missing_weights(folder: Path, loading_info: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError if weights are missing: the libraries only warn, and continue with random ones."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ValueError(f"model={folder}: lacks weights ({', '.join(missing[:3])}); {MODEL_REMEDY}")
