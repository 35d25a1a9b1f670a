"""The `decode` command: latents -> mp4 files and contact sheets. Shapes: F frames, X Y pixel height and width."""

import io
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from common.device import pick_device
from common.files import FolderLock, refuse_foreign_files, staged_output, write_file
from common.model_folder import locate_model
from common.options import write_config
from common.progress import track_progress
from shards import latent_store
from stage1_encode.config import DecodeConfig
from stage1_encode.decoders.load_decoder import check_decoder, use_decoder
from stage1_encode.media.video_writer import write_video
from stage1_encode.models import vae

CONTACT_SHEET, DECODE_CONFIG_FILE = "contact.png", "decode.yaml"
# what decode and sample write into a folder, and what they left there before both wrote beside it
VIDEO_FOLDER_FILES = re.compile(
    r"(contact(-\d+x\d+)?(-\d+)?\.png|.*\.mp4|(decode|sample|.*\.mp4)\.yaml)(\.partial)?|sample|.*\.zarr|step-.*"
)
THUMBNAIL_WIDTH, MAX_SHEET_ROWS = 256, 64  # of a contact sheet: pixels, videos
POLL_SECONDS = 5.0


def decode(config: DecodeConfig) -> list[Path]:
    """Write KEY.mp4 for every video of a store and a contact sheet; returns the files.

    Several steps get a folder each. ValueError if the store has no finished step or `out` holds something else.
    """
    store, out = Path(config.latents), Path(config.out)
    steps = latent_store.complete_groups(store)
    if not steps:
        raise ValueError(f"latents={store}: holds no finished step; sample again")
    model = prepare_decoding(config, steps)
    with FolderLock(out) as lock:
        lock.hold()
        return decode_steps(config, model, steps, in_folders=len(steps) > 1)


def decode_as_written(config: DecodeConfig) -> Iterator[Path]:
    """Decode each step that a training run finishes into its own folder; yields contact sheets until the run has ended.

    The store may not exist yet. A step that has a contact sheet is not decoded again.
    """
    store, out = Path(config.latents), Path(config.out)
    model = prepare_decoding(config, finished_steps(store))
    with FolderLock(out) as lock:
        lock.hold()
        while True:
            # read before the steps are listed; the other way round, a last step in between would be missed
            is_complete = latent_store.is_store_complete(store)
            for step in finished_steps(store):
                if not (out / step / CONTACT_SHEET).is_file():
                    yield decode_steps(config, model, [step], in_folders=True)[-1]
            if is_complete:
                return
            time.sleep(POLL_SECONDS)


def finished_steps(store: Path) -> list[str]:
    """Return the finished steps of a store; none if it does not exist yet."""
    return latent_store.complete_groups(store) if (store / "zarr.json").is_file() else []


def prepare_decoding(config: DecodeConfig, steps: Sequence[str]) -> vae.WanVae:
    """Check the output folder and load the VAE."""
    check_video_folder(Path(config.out), steps)
    check_decoder(config.decoder, config.model)
    folder = locate_model(config.model, ("vae",))
    model = vae.load_vae(folder, dtype=getattr(torch, config.vae_dtype), device=pick_device(config.device))
    return use_decoder(model, config.decoder)


def check_video_folder(folder: Path, steps: Sequence[str]) -> None:
    """Raise ValueError if a folder holds anything but videos made by this program and folders of these steps."""
    refuse_foreign_files(folder, lambda name: name in steps or VIDEO_FOLDER_FILES.fullmatch(name) is not None)


def decode_steps(config: DecodeConfig, model: vae.WanVae, steps: Sequence[str], *, in_folders: bool) -> list[Path]:
    """Decode all of the steps or none into the output folder, or into folders of their names; returns the files."""
    out = Path(config.out)
    with staged_output(out) as staging:
        folders = [staging / step if in_folders else staging for step in steps]
        pairs = zip(steps, folders, strict=True)
        files = [path for step, folder in pairs for path in decode_step(config, model, step, folder)]
        write_config(staging / DECODE_CONFIG_FILE, config)
    return [out / path.relative_to(staging) for path in files]


def decode_step(config: DecodeConfig, model: vae.WanVae, step: str, folder: Path) -> list[Path]:
    """Write the videos of one step and their contact sheet; returns the files. ValueError if latents are not finite."""
    store = Path(config.latents)
    group = latent_store.describe_group(store, step)
    folder.mkdir(exist_ok=True)
    files, sheet_rows = [], []
    for row, key in enumerate(track_progress(group.keys, total=len(group.keys), label="decode")):
        (latents,) = read_finite_latents(store, group, range(row, row + 1))
        pixels = vae.decode_video(model, latents).numpy()
        files.append(write_video(folder / f"{key}.mp4", pixels, fps=group.spec.fps))
        if row < MAX_SHEET_ROWS:  # a sheet of thousands of videos would fill the memory
            sheet_rows.append(make_thumbnails(pixels, columns=config.columns))
    # last, because `decode_as_written` takes a contact sheet for a finished step
    return [*files, write_contact_sheet(folder / CONTACT_SHEET, sheet_rows)]


def read_finite_latents(store: Path, group: latent_store.LatentGroup, rows: range) -> Tensor:
    """Return rows of a group (B C T H W); ValueError if a value is not finite."""
    latents = latent_store.read_latent_rows(store, group.step, rows.start, rows.stop)
    for key, video in zip(group.keys[rows.start : rows.stop], latents, strict=True):
        if not video.isfinite().all():
            raise ValueError(f"latents={store}: {group.step}/{key} is not finite; sample it again")
    return latents


def make_thumbnails(pixels: numpy.ndarray, *, columns: int) -> numpy.ndarray:
    """Return evenly spaced frames of a video (F X Y 3), first and last included, in a row: (x columns*y 3) uint8."""
    frame_indices = numpy.linspace(0, len(pixels) - 1, columns).round().astype(int)
    height, width = pixels.shape[1:3]
    size = (min(width, THUMBNAIL_WIDTH), round(height * min(1.0, THUMBNAIL_WIDTH / width)))
    return numpy.concatenate(
        [numpy.asarray(Image.fromarray(pixels[index]).resize(size)) for index in frame_indices], axis=1
    )


def write_contact_sheet(path: Path, rows: Sequence[numpy.ndarray]) -> Path:
    """Write rows of pictures, one below the other, as a PNG file, atomically; returns its path."""
    data = io.BytesIO()
    Image.fromarray(numpy.concatenate(rows)).save(data, format="PNG")
    write_file(path, data.getbuffer())
    return path
