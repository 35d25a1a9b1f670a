"""A cache of latents and text conditions as LightX2V's data processing writes it for Wan2.2-TI2V-5B.

Source: ModelTC/LightX2V at f8aee98, `lightx2v_train/data_process/wan/build_latent_dataset.py` (writer) and
`lightx2v_train/lightx2v_train/data/video_dataset.py` (reader). `metadata.jsonl` (or one per rank) names two files a
clip: the video's, {"latents": (C T H W)}, already normalized (`Wan2_2_VAE.encode` applies mean and std), and the
condition's, {"prompt", "conditions": {"prompt_embed": (512 D)}}, with zero rows after the prompt; both bf16 unless
told otherwise. `negative_condition.pt` beside them is a condition of the negative prompt. Not executed in LightX2V.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from common.files import parse_json, read_file
from common.model_folder import load_pickled
from stage1_encode.imported_latents.stored_clip import ClipError, StoredClip, is_plain_tensor
from stage1_encode.media.rows import Row

METADATA_FILE, RANK_FILES, NEGATIVE_CONDITION = "metadata.jsonl", "metadata_rank*.jsonl", "negative_condition.pt"
CONDITION_KEYS = ("conditioning", "positive", "conditions", "condition", "prompt_embed")  # nested in this order


@dataclass(frozen=True)
class MetadataLine:
    """The fields of a line of the metadata that are used."""

    caption: str = ""
    video_latent_path: str = ""
    condition_path: str = ""


@dataclass(frozen=True, slots=True)
class CacheRow(Row):
    """A row whose `path` is that of the latents, and whose `line` counts through all metadata files."""

    condition_path: str


@dataclass(frozen=True)
class StoredCondition:
    """An embedded prompt."""

    prompt: str  # "" = not stated
    text: Tensor  # (L D), with padding


@dataclass(frozen=True)
class LightX2VSource:
    """The folder of a cache, or one file of metadata."""

    path: Path
    program: ClassVar[str] = "LightX2V"
    is_normalized: ClassVar[bool] = True

    @property
    def folder(self) -> Path:
        """Where the paths of rows start."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def default_negative(self) -> Path | None:
        """The condition of the negative prompt, if the cache has one."""
        path = self.folder / NEGATIVE_CONDITION
        return path if path.is_file() else None

    def read_rows(self, *, text_only: bool) -> Iterator[Row]:
        """Yield a row per line of the metadata; ValueError if it cannot be read."""
        number, first_line = 0, 1
        for file in metadata_files(self.path):
            try:
                lines = read_file(file).splitlines()
            except OSError as error:
                raise ValueError(f"data={file}: cannot be read ({error.strerror}); check the path") from error
            for line, text in enumerate(lines, first_line):
                if text.strip():
                    yield parse_line(number, line, text, text_only=text_only)
                    number += 1
            first_line += len(lines)

    def read_clips(self, rows: Sequence[Row], *, text_only: bool) -> Iterator[StoredClip]:
        """Yield the clip of each row; `text_only` is decided by the row."""
        for row in rows:
            assert isinstance(row, CacheRow), row
            try:
                latents = read_latents(self.folder / row.path) if row.path and not row.problem else None
                text = None if row.problem else read_condition(self.folder / row.condition_path).text
                yield StoredClip(latents, text)
            except ClipError as error:
                yield StoredClip(problem=str(error))


def metadata_files(path: Path) -> list[Path]:
    """The metadata of a cache: one file, or else those of the ranks that made it."""
    if not path.is_dir():
        return [path]
    common = path / METADATA_FILE
    return [common] if common.is_file() else sorted(path.glob(RANK_FILES))


def parse_line(number: int, line: int, text: bytes, *, text_only: bool) -> CacheRow:
    """The row of a line of the metadata."""
    try:
        fields = parse_json(text, MetadataLine, "the line")
    except ValueError:
        problem = "the line is not an object of LightX2V's metadata"
        return CacheRow(number, line, "", "", None, problem, "")
    problem = "" if fields.condition_path else "no condition_path given"
    if not fields.video_latent_path and not text_only:
        problem = "no video_latent_path given"
    return CacheRow(number, line, fields.video_latent_path, fields.caption, None, problem, fields.condition_path)


def read_tensor_file(path: Path) -> object:
    """Content of a file of torch.save, whose tensors stay on disk; `ClipError` that does not repeat its folder."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ClipError(f"the file {path.name} does not exist")
        return load_pickled(path)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ClipError(f"{error.strerror}") from error
    except ValueError as error:
        raise ClipError(str(error).replace(f"{path}", path.name)) from error


def read_latents(path: Path) -> Tensor:
    """Latents (C T H W) of a whole clip, which stay on disk; `ClipError`."""
    content = read_tensor_file(path)
    latents = content.get("latents") if isinstance(content, dict) else content
    if not is_plain_tensor(latents):
        raise ClipError(f"{path.name} holds no latents")
    return latents


def read_condition(path: Path) -> StoredCondition:
    """An embedded prompt; `ClipError`."""
    content = read_tensor_file(path)
    prompt = content.get("prompt") if isinstance(content, dict) else ""
    text: object = content
    for key in CONDITION_KEYS:
        text = text.get(key, text) if isinstance(text, dict) else text
    if not is_plain_tensor(text):
        raise ClipError(f"{path.name} holds no prompt_embed")
    text = text[0] if text.ndim == 3 and len(text) == 1 else text  # a batch of one
    return StoredCondition(prompt if isinstance(prompt, str) else "", text)
