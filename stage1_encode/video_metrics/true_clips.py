"""True clips as a row of an evaluation: the whole clips of the conditions, through the VAE, as sets of the store.

A teacher that cannot be told from them is as good as the test can see; a student is not compared with them, but with
the teacher. Shapes: B clips, C channels, T latent frames, H W latent size, F frames, X Y pixels.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy
import torch
from einops import rearrange
from torch import Tensor

from common.model_folder import digest_files
from common.progress import ProgressBar
from common.video import VideoSpec
from shards import latent_store
from shards.comparison import Candidate, latent_set_name
from shards.record import Record
from stage1_encode.media.video_frame import UnreadableError
from stage1_encode.media.whole_clip import read_clip
from stage1_encode.models.vae import WanVae

LARGEST_DIFFERENCE = 0.2  # rms of first frames, in deviations of a latent; of one clip 0.001 in float32, of another 0.5
TRUE_CLIPS = Candidate("true", "true clips, through the VAE", 0, "true")


def encode_true_clips(
    model: WanVae,
    store: Path,
    clips: Path,
    records: Sequence[Record],
    spec: VideoSpec,
    *,
    seeds: Sequence[int],
    batch_size: int,
) -> None:
    """Write the sets of the true clips of the records, which lie in the folder `clips`, into the store.

    There is one clip per condition, so the sets of all seeds are equal; complete ones of the same files are kept.
    ValueError for a record without a clip, one that is too short, or one that begins with another picture.
    """
    paths = [clip_path(clips, record) for record in records]
    names = [latent_set_name(TRUE_CLIPS, seed) for seed in seeds]
    digest = hashlib.sha256(repr((spec, paths, [digest_files(Path(path)) for path in paths])).encode()).hexdigest()
    if all(is_kept(store, name, digest) for name in names):
        return
    keys, prompts = tuple(record.key for record in records), tuple(record.source.prompt for record in records)
    for name, seed in zip(names, seeds, strict=True):
        group = latent_store.LatentGroup(name, spec, keys, prompts, (seed,) * len(records))
        latent_store.create_group(store, group)
    with ProgressBar(len(records), label="encode true clips") as progress:
        for start in range(0, len(records), batch_size):
            rows = range(start, min(start + batch_size, len(records)))
            pixels = numpy.stack([read_true_clip(clips, paths[row], spec) for row in rows])
            latents = encode_clips(model, torch.from_numpy(pixels))
            for row, clip in zip(rows, latents, strict=True):
                pin_first_frame(clips, records[row], clip)
            for name in names:
                latent_store.write_latents(store, name, rows, latents)
            progress.advance(count=len(rows))
    for name in names:
        latent_store.finish_group(store, name, facts=latent_store.SetFacts(digest))


def check_clips(clips: Path, records: Sequence[Record], spec: VideoSpec) -> None:
    """Raise ValueError if a record has no clip, or the first clip cannot be read or is too short."""
    if not clips.exists():
        raise ValueError(f"true_clips={clips}: no such file or folder; name the folder of the clips of these shards")
    paths = [clip_path(clips, record) for record in records]
    read_true_clip(clips, paths[0], spec)  # clips of one folder are mostly of one kind


def clip_path(clips: Path, record: Record) -> str:
    """The file of a record in the folder `clips`, or beside that CSV; ValueError if it has none, or is not there."""
    folder = clips if clips.is_dir() else clips.parent
    path = str(folder.absolute() / record.source.path) if record.source.path else ""
    if not path or not Path(path).is_file():
        refuse_clips(clips, record, f"{path}: no such file" if path else "has a prompt alone")
    return path


def refuse_clips(clips: Path, record: Record, reason: str) -> NoReturn:
    """Raise ValueError: the folder's clips are not those of the shards."""
    raise ValueError(f"true_clips={clips}: record {record.key}: {reason}; name the folder of the clips of these shards")


def pin_first_frame(clips: Path, record: Record, clip: Tensor) -> None:
    """Give a clip (C T H W) its record's first frame, in the precision that every other set has.

    ValueError if the clip begins with another one: folders of different clips may hold the same file names.
    """
    if record.first_frame is None:
        return
    given = record.first_frame.float()
    if (clip[:, :1] - given).square().mean().sqrt() > LARGEST_DIFFERENCE:
        refuse_clips(clips, record, f"{record.source.path} begins with another picture")
    clip[:, :1] = given


def is_kept(store: Path, name: str, digest: str) -> bool:
    """Whether a set is complete and of the same files."""
    if not (store / name).is_dir() or latent_store.group_damage(store, name) is not None:
        return False
    return latent_store.read_group_facts(store, name).digest == digest


def read_true_clip(clips: Path, path: str, spec: VideoSpec) -> numpy.ndarray:
    """The frames (F X Y 3) uint8 of a clip; ValueError that names it."""
    try:
        return read_clip(path, spec)
    except UnreadableError as error:
        raise ValueError(f"true_clips={clips}: {path} {error}; leave --true-clips out, or take longer clips") from error


@torch.no_grad()
def encode_clips(model: WanVae, pixels: Tensor) -> Tensor:
    """Latents (B C T H W) float32 on the CPU, the normalized mode, of clips (B F X Y 3) uint8."""
    video = rearrange(pixels.to(model.device), "b f x y c -> b c f x y").float() / 127.5 - 1
    latents = model.model.encode(video.to(model.model.dtype)).latent_dist.mode().float()
    return ((latents - model.mean) / model.std).cpu()
