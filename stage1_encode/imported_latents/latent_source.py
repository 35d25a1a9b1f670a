"""Latents and embeddings of other programs in place of a CSV: which program's they are, and the negative prompt.

The files do not say which model made them. `--model` states it, and its fingerprints become those of the data set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from common.model_folder import fingerprint_part, locate_model, locate_part, same_fingerprint
from common.video import TEXT_LENGTH
from shards.manifest import MANIFEST_FILE, load_negative_embedding, read_manifest
from shards.storage.open import LocalStorage
from stage1_encode.config import NEGATIVE_PROMPT, EncodeConfig
from stage1_encode.imported_latents.fastvideo import FastVideoSource
from stage1_encode.imported_latents.lightx2v import METADATA_FILE, LightX2VSource, metadata_files, read_condition
from stage1_encode.imported_latents.stored_clip import ClipError, RecordLayout, trim_text
from stage1_encode.media.rows import Row, check_first_rows, read_csv_rows
from stage1_encode.models.loading import read_text_width
from stage1_encode.models.vae import read_latent_statistics

LatentSource = FastVideoSource | LightX2VSource
TEXT_PARTS = ("text_encoder", "tokenizer")
ENCODER_PARTS = ("vae", *TEXT_PARTS)
# options of what is not computed here
WITHOUT_EFFECT = ("compile", "hdr", "untagged_hd", "engine", "base_folder", "sizes")


@dataclass(frozen=True)
class NegativePrompt:
    """A negative prompt and its embedding (L D) bf16."""

    prompt: str
    text: Tensor


def open_source(path: Path) -> LatentSource | None:
    """The latents of another program below a path; None if it is no folder and no such file, so perhaps a CSV."""
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return FastVideoSource(path)
    if path.suffix == ".jsonl" or (path.is_dir() and metadata_files(path)):
        return LightX2VSource(path)
    if path.is_dir():
        raise ValueError(
            f"data={path}: is a folder without Parquet files of FastVideo and {METADATA_FILE} of LightX2V; give a CSV, "
            "or one of these"
        )
    return None


def read_rows(config: EncodeConfig, *, stop_after_failures: int = 0) -> Iterator[Row]:
    """The rows of a CSV or another program's files; see `read_csv_rows`."""
    path, source = Path(config.data), open_source(Path(config.data))
    if source is None:
        return read_csv_rows(
            path,
            text_only=config.text_only,
            stop_after_failures=stop_after_failures,
            with_sizes=bool(config.frame_sizes),
        )
    rows = source.read_rows(text_only=config.text_only)
    return check_first_rows(path, rows, stop_after_failures=stop_after_failures)


def complete_config(config: EncodeConfig) -> EncodeConfig:
    """The options with the negative prompt whose embedding an import takes over; those of a CSV are unchanged.

    ValueError for options without an effect, and for an embedding that is not to be had or of another text encoder.
    """
    path, source = Path(config.data), open_source(Path(config.data))
    if source is None:
        if config.negative and path.exists():  # else the path is what is wrong
            raise ValueError(f"negative={config.negative}: goes with --from; a CSV's data set embeds --negative-prompt")
        return config
    for item in fields(config):
        value = vars(config)[item.name]
        if item.name in WITHOUT_EFFECT and value != item.default:
            raise ValueError(f"{item.name}={value}: has no effect on latents that are not encoded here; leave it out")
    prompt = read_negative(config, source).prompt
    if config.negative_prompt not in (NEGATIVE_PROMPT, prompt):
        raise ValueError(
            f"negative_prompt={config.negative_prompt}: is not that of the embedding, {prompt!r}; leave it out"
        )
    return replace(config, negative_prompt=prompt)


def read_negative(config: EncodeConfig, source: LatentSource) -> NegativePrompt:
    """The negative prompt of an import; ValueError if none is known, or it cannot be that of the model."""
    path = Path(config.negative) if config.negative else source.default_negative
    if path is None:
        raise ValueError(
            f"data={config.data}: holds no embedding of a negative prompt; give --negative DATA, a data set that was "
            "encoded with the same text encoder"
        )
    folder = locate_model(config.model, ENCODER_PARTS)
    negative = read_own_negative(path, folder) if path.is_dir() else read_foreign_negative(path)
    rows, columns = negative.text.shape
    text_dim = read_text_width(folder)
    if columns != text_dim or rows > TEXT_LENGTH or not (negative.text.isfinite().all() and negative.text.any()):
        problem = f"is {rows} x {columns}, not an embedding of {text_dim} columns, or holds NaN or zeros only"
        raise ValueError(f"negative={path}: {problem}; give that of the same text encoder")
    return negative


def read_own_negative(path: Path, model: Path) -> NegativePrompt:
    """The negative prompt of a data set; ValueError if its text encoder is not that of a located model."""
    if not (path / MANIFEST_FILE).is_file():
        raise ValueError(f"negative={path}: is no finished data set; give one, or a condition file of LightX2V")
    manifest = read_manifest(path)
    for part in TEXT_PARTS:
        if not same_fingerprint(vars(manifest.encoder)[part], fingerprint_part(locate_part(model, part))):
            raise ValueError(f"negative={path}: was embedded with another {part} than model={model} has; give that one")
    return NegativePrompt(manifest.encoder.negative_prompt, load_negative_embedding(LocalStorage(str(path)), manifest))


def read_foreign_negative(path: Path) -> NegativePrompt:
    """The negative prompt of a condition file of LightX2V; ValueError if it is not one or does not state its prompt."""
    try:
        condition = read_condition(path)
        text = trim_text(condition.text)
    except ClipError as error:
        raise ValueError(f"negative={path}: {error}; give a data set, or a condition file of LightX2V") from error
    if not condition.prompt.strip():
        raise ValueError(f"negative={path}: does not state its prompt, which the manifest names; give --negative DATA")
    return NegativePrompt(condition.prompt, text)


def record_layout(config: EncodeConfig, source: LatentSource) -> RecordLayout:
    """What the records of an import must look like; ValueError if the model is not a TI2V-5B."""
    folder = locate_model(config.model, ENCODER_PARTS)
    statistics = read_latent_statistics(folder)
    return RecordLayout(config.spec, read_text_width(folder), None if source.is_normalized else statistics)
