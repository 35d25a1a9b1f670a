"""Parquet files as FastVideo's preprocessing writes them for Wan.

Source: hao-ai-lab/FastVideo at 2f3d407, `fastvideo/dataset/dataloader/schema.py` (the columns),
`pipelines/preprocess/preprocess_pipeline_base.py` (their values) and `training/training_utils.py`. A tensor X is three
columns: X_bytes in row-major order, X_shape, X_dtype (float32). `vae_latent` (C T H W) is the mean of the VAE's
posterior for the whole clip, which only its trainer normalizes (`normalize_dit_input`); `text_embedding` (L D) has no
padding, except in files of prompts alone. Width, height and num_frames of a row are not used: older files swap the
first two, and the third counts latent frames. Not executed in FastVideo.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stage1_encode.imported_latents.stored_clip import DTYPES, ClipError, StoredClip, channel_problem
from stage1_encode.media.rows import Row

LATENT, TEXT, CAPTION = "vae_latent", "text_embedding", "caption"
PARTS = ("bytes", "shape", "dtype")


@dataclass(frozen=True, slots=True)
class ParquetRow(Row):
    """A row whose `line` counts through all files, as `verify` needs it, and whose `path` is for people."""

    file: str
    index: int  # within the file


@dataclass(frozen=True)
class FastVideoSource:
    """A Parquet file, or a folder with any number of them at any depth."""

    path: Path
    program: ClassVar[str] = "FastVideo"
    is_normalized: ClassVar[bool] = False
    default_negative: ClassVar[Path | None] = None  # the files hold no embedding of a negative prompt

    @property
    def folder(self) -> Path:
        """Where the paths of rows start."""
        return self.path if self.path.is_dir() else self.path.parent

    def read_rows(self, *, text_only: bool) -> Iterator[Row]:
        """Yield a row per clip; ValueError if a file is damaged or of another kind."""
        files = sorted(self.path.rglob("*.parquet"), key=natural_order) if self.path.is_dir() else [self.path]
        number = 0
        for file in files:
            name = file.relative_to(self.folder).as_posix()
            for index, (caption, problem) in enumerate(read_captions(file, text_only=text_only)):
                path = f"row {index + 1} of {name}"
                yield ParquetRow(number, number + 1, path, caption, None, problem, name, index)
                number += 1

    def read_clips(self, rows: Sequence[Row], *, text_only: bool) -> Iterator[StoredClip]:
        """Yield the clip of each row, of which one at a time is in memory."""
        parquet_rows = [row for row in rows if isinstance(row, ParquetRow)]
        for name, group in groupby(parquet_rows, key=lambda row: row.file):
            yield from read_file_clips(self.folder / name, [row.index for row in group], text_only=text_only)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts data_chunk_10 after data_chunk_9, so that files can be added at the end."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]


def parquet_library(path: Path) -> Any:  # noqa: ANN401
    """The optional library that reads Parquet; ValueError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"data={path}: Parquet is read by pyarrow, which is missing; pip install 'ti2v-distill[parquet]'"
        ) from error
    return pyarrow


def read_captions(path: Path, *, text_only: bool) -> Iterator[tuple[str, str]]:
    """Yield the caption of each row of a file and its problem, "" = none; no tensor is read."""
    library = parquet_library(path)
    try:
        file = library.parquet.ParquetFile(path, memory_map=True)
        required = [CAPTION, *tensor_columns(TEXT), *([] if text_only else tensor_columns(LATENT))]
        missing = [name for name in required if name not in file.schema_arrow.names]
        shape = f"{LATENT}_shape"
        columns = [CAPTION, *([shape] if shape in file.schema_arrow.names else [])]
        rows = [] if missing else file.read(columns=columns).to_pylist()
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data={path}: cannot be read as Parquet ({reason}); copy it again") from error
    if missing:
        remedy = "give --text-only" if missing == tensor_columns(LATENT) else "give files of its preprocessing for Wan"
        raise ValueError(f"data={path}: lacks columns that FastVideo writes: {', '.join(missing)}; {remedy}")
    for row in rows:
        caption, size = row[CAPTION], row.get(shape)
        # of another type: reported when the tensor is read
        problem = channel_problem(size) if isinstance(size, list) and size else ""
        yield caption if isinstance(caption, str) else "", problem


def tensor_columns(name: str) -> list[str]:
    """The three columns of a tensor."""
    return [f"{name}_{part}" for part in PARTS]


def read_file_clips(path: Path, indices: Collection[int], *, text_only: bool) -> Iterator[StoredClip]:
    """Yield the clips of ascending rows of a file; once it cannot be read on, the problem for each one left."""
    library, remaining, problem = parquet_library(path), len(indices), "its row is missing from the file"
    try:
        file = library.parquet.ParquetFile(path, memory_map=True)
        columns = [*tensor_columns(LATENT), *tensor_columns(TEXT)]
        names = [name for name in columns if name in file.schema_arrow.names]
        batches = file.iter_batches(batch_size=1, columns=names) if remaining else iter(())
        for index, batch in enumerate(batches):
            if index in indices:
                yield parse_clip(batch.to_pylist()[0], text_only=text_only)
                remaining -= 1
            if not remaining:
                return
    except (library.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"the Parquet file is damaged ({str(error).partition(':')[0]})"
    yield from [StoredClip(problem=problem)] * remaining


def parse_clip(row: Mapping[str, object], *, text_only: bool) -> StoredClip:
    """The clip of one row."""
    try:
        latents, text = parse_tensor(row, LATENT), parse_tensor(row, TEXT)
    except ClipError as error:
        return StoredClip(problem=str(error))
    problem = "" if text_only or latents is not None else f"{LATENT} holds no latents"
    return StoredClip(latents, text, problem)


def parse_tensor(row: Mapping[str, object], name: str) -> Tensor | None:
    """A tensor of a row, None if it is empty; `ClipError` if its three columns contradict each other."""
    data, shape, kind = (row.get(column) for column in tensor_columns(name))
    if not data:
        return None
    dtype, sizes = DTYPES.get(str(kind).removeprefix("torch.")), shape if isinstance(shape, list) else [0]
    are_sizes = all(isinstance(size, int) and size > 0 for size in sizes)
    if not (dtype and isinstance(data, bytes) and are_sizes and math.prod(sizes) * dtype.itemsize == len(data)):
        raise ClipError(f"{name} is not what its columns say, a tensor of dtype {kind!r} and shape {shape!r}")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(sizes)
