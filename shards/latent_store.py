"""The zarr store of sampled latents: written by training and sampling, read by decoding.

Layout: one group a step, holding `latents` (N C T H W) float32, a chunk a video, or a few. The group's attributes carry
the `VideoSpec`, the keys, prompts and seeds, and `done`, written last: a group without it is still being written.
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
    """The latents of one step."""

    step: str
    spec: VideoSpec
    keys: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def create_group(path: Path, group: LatentGroup, *, videos_per_chunk: int = 1) -> None:
    """Make room for one step's latents; an unfinished group of the same name is replaced.

    `together` videos share a chunk: many small ones are written and read faster, but by one process only.
    """
    store = zarr.open_group(path, mode="a")
    zarr_group = store.create_group(group.step, overwrite=True)
    shape = (len(group.keys), *group.spec.latent_shape)
    zarr_group.create_array(
        "latents", shape=shape, chunks=(videos_per_chunk, *group.spec.latent_shape), dtype="float32", compressors=None
    )
    zarr_group.attrs.put(
        {
            "spec": asdict(group.spec),
            "keys": list(group.keys),
            "prompts": list(group.prompts),
            "seeds": list(group.seeds),
            "done": False,
        }
    )


def write_latents(path: Path, step: str, rows: Sequence[int], latents: Tensor) -> None:
    """Store latents (B C T H W) as the rows of a step; different ranks may write different rows."""
    array = zarr.open_array(path / step / "latents", mode="r+")
    videos = latents.detach().to("cpu", torch.float32).numpy()
    if list(rows) == list(range(rows[0], rows[0] + len(videos))):
        array[rows[0] : rows[0] + len(videos)] = videos
        return
    for row, video in zip(rows, videos, strict=True):
        array[row] = video


def finish_group(path: Path, step: str, *, facts: Mapping[str, str | float] | None = None) -> None:
    """Mark a step as complete, and keep `facts` of it."""
    zarr.open_group(path / step, mode="r+").attrs.update({"facts": dict(facts or {}), "done": True})


def read_group_facts(path: Path, step: str) -> dict[str, str | float]:
    """What `finish` was told of a step; empty where the step is not there or not complete."""
    if not (path / step / "zarr.json").is_file():
        return {}
    attributes: Mapping[str, Any] = zarr.open_group(path / step, mode="r").attrs.asdict()
    return dict(attributes.get("facts", {})) if attributes.get("done") else {}


def complete_groups(path: Path) -> list[str]:
    """Names of the complete steps, sorted; ValueError where `path` is no store of latents."""
    if not (path / "zarr.json").is_file():
        raise ValueError(f"latents={path}: not a zarr store of latents")
    groups = zarr.open_group(path, mode="r").groups()
    return sorted(name for name, group in groups if group.attrs.get("done"))


def describe_group(path: Path, step: str) -> LatentGroup:
    """What a step holds; ValueError where a key would name a file in another folder."""
    attributes: Mapping[str, Any] = zarr.open_group(path / step, mode="r").attrs.asdict()
    for key in attributes["keys"]:
        if not is_plain_name(key):
            raise ValueError(f"latents={path}: {step}: the key {key!r} holds a path, where a plain name must be")
    return LatentGroup(
        step,
        VideoSpec(**attributes["spec"]),
        tuple(attributes["keys"]),
        tuple(attributes["prompts"]),
        tuple(attributes["seeds"]),
    )


def read_latents(path: Path, step: str, row: int) -> Tensor:
    """One video's latents (C T H W) float32."""
    video = zarr.open_array(path / step / "latents", mode="r")[row]
    return torch.from_numpy(numpy.asarray(video))


def read_latent_rows(path: Path, step: str, start: int, stop: int) -> Tensor:
    """The latents (B C T H W) float32 of rows start..stop-1."""
    videos = zarr.open_array(path / step / "latents", mode="r")[start:stop]
    return torch.from_numpy(numpy.asarray(videos))


def mark_store_complete(path: Path, complete: bool) -> None:
    """Say of a whole store whether more steps will come."""
    zarr.open_group(path, mode="a").attrs.update({"complete": complete})


def is_store_complete(path: Path) -> bool:
    """Whether the store is there and no more steps will come."""
    return (path / "zarr.json").is_file() and bool(zarr.open_group(path, mode="r").attrs.get("complete"))
