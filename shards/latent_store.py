"""The zarr store of sampled latents: written by training and sampling, read by decoding.

Layout: one group per step with the array `latents` (N C T H W) float32, one or a few videos per chunk. The attributes
of a group are the `VideoSpec`, the keys, prompts and seeds, and `done`, which is true once all latents are written.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import msgspec
import numpy
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from common.files import Count, read_json
from common.video import VideoSpec
from shards.record import is_plain_name

NODE_FILE = "zarr.json"  # description of a group or array, in its folder
FLOAT_BYTES, CHECKSUM_BYTES = 4, 4
Attributes = TypeVar("Attributes")
PositiveCount = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


@dataclass(frozen=True)
class LatentGroup:
    """The description of one step's latents."""

    step: str
    spec: VideoSpec
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class SetFacts:
    """How the latents of a set were sampled; evaluation stores it."""

    digest: str = ""  # of everything that decides the latents
    seconds: float = 0.0  # per video


@dataclass(frozen=True)
class GroupAttributes:
    """The attributes of a step's group; ValueError if they contradict each other."""

    spec: VideoSpec
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    done: bool = False
    facts: SetFacts = SetFacts()

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.prompts) == len(self.seeds):
            raise ValueError(f"{len(self.keys)} keys, {len(self.prompts)} prompts and {len(self.seeds)} seeds")
        for key in self.keys:
            if not is_plain_name(key):
                raise ValueError(f"the key {key!r} holds a path; it must be a plain name")


@dataclass(frozen=True)
class StoreAttributes:
    """The attributes of the store itself."""

    complete: bool = False  # no more steps will be added


@dataclass(frozen=True)
class GroupFile(Generic[Attributes]):
    """The zarr.json of a group."""

    attributes: Attributes


@dataclass(frozen=True)
class ChunkShape:
    """The number of videos in a chunk, and the shape of each."""

    chunk_shape: tuple[PositiveCount, PositiveCount, PositiveCount, PositiveCount, PositiveCount]


@dataclass(frozen=True)
class ChunkGrid:
    """How an array is divided into chunks."""

    configuration: ChunkShape


@dataclass(frozen=True)
class ArrayCodec:
    """One stage of how a chunk becomes the bytes of a file; compressed chunks are not written here."""

    name: Literal["bytes", "crc32c"]


@dataclass(frozen=True)
class ArrayFile:
    """The zarr.json of an array, as `create_group` writes it; version 0.1 wrote it without crc32c."""

    shape: tuple[Count, Count, Count, Count, Count]
    data_type: Literal["float32"]
    chunk_grid: ChunkGrid
    codecs: tuple[ArrayCodec, ...]
    zarr_format: Literal[3]

    @property
    def videos_per_chunk(self) -> int:
        """Number of videos that share a file."""
        return self.chunk_grid.configuration.chunk_shape[0]

    @property
    def file_bytes(self) -> int:
        """Size of the file of each chunk; the last one is full too."""
        checksums = sum(codec.name == "crc32c" for codec in self.codecs)
        return FLOAT_BYTES * math.prod(self.chunk_grid.configuration.chunk_shape) + CHECKSUM_BYTES * checksums


def create_group(path: Path, group: LatentGroup, *, videos_per_chunk: int = 1) -> None:
    """Create the array of one step, replacing a group of that name; more `videos_per_chunk` suit small videos."""
    # Only one process may write if a chunk holds several videos.
    if (path / NODE_FILE).exists():
        _read_node(path, StoreAttributes)
    zarr_group = zarr.open_group(path, mode="a", zarr_format=3).create_group(group.step, overwrite=True)
    shape, chunks = (len(group.keys), *group.spec.latent_shape), (videos_per_chunk, *group.spec.latent_shape)
    # Latents are close to noise, which compression does not make smaller. zarr does not write a chunk of nothing but
    # the fill value, so it must not be a number: zeros would look like a chunk that was lost.
    zarr_group.create_array(
        "latents", shape=shape, chunks=chunks, dtype="float32", compressors=[Crc32cCodec()], fill_value=math.nan
    )
    attributes = asdict(group) | {"done": False}
    del attributes["step"]  # is the group's name
    zarr_group.attrs.put(attributes)


def write_latents(path: Path, step: str, rows: Sequence[int], latents: Tensor) -> None:
    """Store latents (B C T H W) as these rows of a step; several ranks may write different rows at once."""
    array = zarr.open_array(path / step / "latents", mode="r+", zarr_format=3)
    videos = latents.detach().to("cpu", torch.float32).numpy()
    if list(rows) == list(range(rows[0], rows[0] + len(videos))):  # one write per chunk instead of one per video
        array[rows[0] : rows[0] + len(videos)] = videos
        return
    for row, video in zip(rows, videos, strict=True):
        array[row] = video


def finish_group(path: Path, step: str, *, facts: SetFacts | None = None) -> None:
    """Mark a step as complete and store `facts` with it."""
    zarr_group = zarr.open_group(path / step, mode="r+", zarr_format=3)
    zarr_group.attrs.update({"facts": asdict(facts or SetFacts()), "done": True})


def read_group_facts(path: Path, step: str) -> SetFacts:
    """The facts that `finish_group` stored; ValueError if the step is missing or its description damaged."""
    return _read_node(path / step, GroupAttributes).facts


def complete_groups(path: Path) -> list[str]:
    """Names of the complete steps, sorted; ValueError if `path` is not a store of latents or a step is damaged."""
    if not (path / NODE_FILE).is_file():
        raise ValueError(f"latents={path}: not a zarr store of latents; name a folder X.zarr")
    steps = sorted(file.parent.name for file in path.glob(f"*/{NODE_FILE}"))
    return [step for step in steps if _read_node(path / step, GroupAttributes).done]


def describe_group(path: Path, step: str) -> LatentGroup:
    """The description of a step; ValueError if it is missing, damaged, or not that of the step's array."""
    stored, array = _read_node(path / step, GroupAttributes), read_json(_array_file(path, step), ArrayFile)
    expected, chunk = (len(stored.keys), *stored.spec.latent_shape), array.chunk_grid.configuration.chunk_shape
    if array.shape != expected or chunk[1:] != expected[1:]:
        raise ValueError(f"{_array_file(path, step)}: has shape {array.shape}, its group describes {expected}")
    return LatentGroup(step, stored.spec, stored.keys, stored.prompts, stored.seeds)


def group_damage(path: Path, step: str) -> str | None:
    """Why a step cannot be used, as text; None if it is complete and all of its files have their full size."""
    try:
        if not _read_node(path / step, GroupAttributes).done:
            return f"{path / step}: is not finished"
        group = describe_group(path, step)
        _check_chunks(path, step, 0, len(group.keys))
    except ValueError as error:
        return str(error)
    return None


def read_latents(path: Path, step: str, row: int) -> Tensor:
    """One video's latents (C T H W) float32."""
    return read_latent_rows(path, step, row, row + 1)[0]


def read_latent_rows(path: Path, step: str, start: int, stop: int) -> Tensor:
    """The latents (B C T H W) float32 of rows start..stop-1; ValueError naming a chunk that is missing or damaged."""
    _check_chunks(path, step, start, stop)
    try:
        videos = zarr.open_array(path / step / "latents", mode="r", zarr_format=3)[start:stop]
    except (ValueError, KeyError, TypeError) as error:  # of a codec: the checksum differs
        reason = str(error).partition(". ")[0]  # the rest is the two checksums
        problem = f"a chunk of {_name_keys(path, step, start, stop)} is damaged ({reason})"
        raise ValueError(f"latents={path}: {step}: {problem}; sample it again") from error
    return torch.from_numpy(numpy.asarray(videos))


def mark_store_complete(path: Path, complete: bool) -> None:
    """Store whether no more steps will be added to the store."""
    zarr.open_group(path, mode="a", zarr_format=3).attrs.update({"complete": complete})


def is_store_complete(path: Path) -> bool:
    """Whether the store exists and no more steps will be added."""
    return (path / NODE_FILE).is_file() and _read_node(path, StoreAttributes).complete


def _read_node(group: Path, kind: type[Attributes]) -> Attributes:
    return read_json(group / NODE_FILE, GroupFile[kind]).attributes  # type: ignore[valid-type]


def _array_file(path: Path, step: str) -> Path:
    return path / step / "latents" / NODE_FILE


def _check_chunks(path: Path, step: str, start: int, stop: int) -> None:
    """Raise ValueError for the first chunk of rows start..stop-1 that has no file of full size.

    zarr reads a missing chunk as its fill value, which was 0 in version 0.1.
    """
    array = read_json(_array_file(path, step), ArrayFile)
    count, expected = array.videos_per_chunk, array.file_bytes
    for chunk in range(start // count, -(-min(stop, array.shape[0]) // count)):
        file = path / step / "latents" / "c" / str(chunk) / "0" / "0" / "0" / "0"
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            keys = _name_keys(path, step, chunk * count, (chunk + 1) * count)
            problem = "is missing" if size is None else f"has {size} bytes, expected {expected}"
            raise ValueError(f"latents={path}: {step}: the chunk of {keys}, {file}, {problem}; sample it again")


def _name_keys(path: Path, step: str, start: int, stop: int) -> str:
    return ", ".join(_read_node(path / step, GroupAttributes).keys[start:stop])
