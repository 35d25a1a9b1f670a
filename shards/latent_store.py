"""The zarr store of sampled latents: written by training and sampling, read by decoding.

Layout: one group per step with the array `latents` (N C T H W) float32, one or a few videos per chunk. The attributes
of a group are the `VideoSpec`, the keys, prompts and seeds, and `done`, which is true once all latents are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import zarr
from torch import Tensor

from common.video import VideoSpec
from shards.record import is_plain_name


@dataclass(frozen=True)
class LatentGroup:
    """The description of one step's latents."""

    step: str
    spec: VideoSpec
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def create_group(path: Path, group: LatentGroup, *, videos_per_chunk: int = 1) -> None:
    """Create the array of one step, replacing a group of that name; more `videos_per_chunk` suit small videos."""
    # Only one process may write if a chunk holds several videos.
    zarr_group = zarr.open_group(path, mode="a").create_group(group.step, overwrite=True)
    shape, chunks = (len(group.keys), *group.spec.latent_shape), (videos_per_chunk, *group.spec.latent_shape)
    # Latents are close to noise, which compression does not make smaller.
    zarr_group.create_array("latents", shape=shape, chunks=chunks, dtype="float32", compressors=None)
    attributes = asdict(group) | {"done": False}
    del attributes["step"]  # is the group's name
    zarr_group.attrs.put(attributes)


def write_latents(path: Path, step: str, rows: Sequence[int], latents: Tensor) -> None:
    """Store latents (B C T H W) as these rows of a step; several ranks may write different rows at once."""
    array = zarr.open_array(path / step / "latents", mode="r+")
    videos = latents.detach().to("cpu", torch.float32).numpy()
    if list(rows) == list(range(rows[0], rows[0] + len(videos))):  # one write per chunk instead of one per video
        array[rows[0] : rows[0] + len(videos)] = videos
        return
    for row, video in zip(rows, videos, strict=True):
        array[row] = video


def finish_group(path: Path, step: str, *, facts: Mapping[str, str | float] | None = None) -> None:
    """Mark a step as complete and store `facts` with it."""
    zarr.open_group(path / step, mode="r+").attrs.update({"facts": dict(facts or {}), "done": True})


def read_group_facts(path: Path, step: str) -> dict[str, str | float]:
    """The facts that `finish_group` stored; empty if the step is missing or incomplete."""
    attributes = _read_attributes(path / step)
    return dict(attributes.get("facts", {})) if attributes.get("done") else {}


def complete_groups(path: Path) -> list[str]:
    """Names of the complete steps, sorted; ValueError if `path` is not a store of latents."""
    if not (path / "zarr.json").is_file():
        raise ValueError(f"latents={path}: not a zarr store of latents")
    groups = zarr.open_group(path, mode="r").groups()
    return sorted(name for name, group in groups if group.attrs.get("done"))


def describe_group(path: Path, step: str) -> LatentGroup:
    """The description of a step; ValueError if a key would name a file in another folder."""
    attributes = _read_attributes(path / step)
    for key in attributes["keys"]:
        if not is_plain_name(key):
            raise ValueError(f"latents={path}: {step}: the key {key!r} holds a path; it must be a plain name")
    keys, prompts, seeds = (tuple(attributes[name]) for name in ("keys", "prompts", "seeds"))
    return LatentGroup(step, VideoSpec(**attributes["spec"]), keys, prompts, seeds)


def read_latents(path: Path, step: str, row: int) -> Tensor:
    """One video's latents (C T H W) float32."""
    return read_latent_rows(path, step, row, row + 1)[0]


def read_latent_rows(path: Path, step: str, start: int, stop: int) -> Tensor:
    """The latents (B C T H W) float32 of rows start..stop-1."""
    videos = zarr.open_array(path / step / "latents", mode="r")[start:stop]
    return torch.from_numpy(numpy.asarray(videos))


def mark_store_complete(path: Path, complete: bool) -> None:
    """Store whether no more steps will be added to the store."""
    zarr.open_group(path, mode="a").attrs.update({"complete": complete})


def is_store_complete(path: Path) -> bool:
    """Whether the store exists and no more steps will be added."""
    return bool(_read_attributes(path).get("complete"))


def _read_attributes(group: Path) -> Mapping[str, Any]:
    """The attributes of a group; empty if it does not exist."""
    return zarr.open_group(group, mode="r").attrs.asdict() if (group / "zarr.json").is_file() else {}
