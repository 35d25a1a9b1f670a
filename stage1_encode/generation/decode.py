"""`decode`: latents become videos, the way back through the same VAE. Shapes: F frames, X Y pixel height and width."""

import io
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image

from common.device import pick_device
from common.files import refuse_foreign_files, write_file
from common.model_folder import locate_model
from common.options import write_config
from common.progress import track_progress
from shards import latent_store
from shards.latent_store import LatentGroup
from stage1_encode.config import DecodeConfig
from stage1_encode.media.video_writer import write_video
from stage1_encode.models import vae

CONTACT_SHEET, DECODE_CONFIG_FILE = "contact.png", "decode.yaml"
VIDEO_FOLDER_FILES = re.compile(
    r"(contact(-\d+)?\.png|.*\.mp4|(decode|sample|.*\.mp4)\.yaml)(\.partial)?|sample|.*\.zarr|step-.*"
)
THUMBNAIL_WIDTH, MAX_SHEET_ROWS = 256, 64  # of the contact sheet: pixels in width, videos
POLL_SECONDS = 5.0


def decode(config: DecodeConfig) -> list[Path]:
    """Write KEY.mp4 for every video of a store, and a contact sheet; one folder a step if there are several."""
    store, out = Path(config.latents), Path(config.out)
    steps = list_finished_steps(store)
    check_video_folder(out, steps)
    model = load_decode_vae(config)
    files: list[Path] = []
    for step in steps:
        folder = out if len(steps) == 1 else out / step
        folder.mkdir(parents=True, exist_ok=True)
        files += decode_step(config, model, latent_store.describe_group(store, step), folder)
    write_config(out / DECODE_CONFIG_FILE, config)
    return files


def list_finished_steps(store: Path) -> list[str]:
    """Names of the steps to decode; ValueError where there are none."""
    steps = latent_store.complete_groups(store)
    if not steps:
        raise ValueError(f"latents={store}: holds no finished step")
    return steps


def check_video_folder(folder: Path, steps: Sequence[str]) -> None:
    """Refuse a folder that holds anything but videos made here, and folders of these steps."""
    refuse_foreign_files(folder, lambda name: name in steps or VIDEO_FOLDER_FILES.fullmatch(name) is not None)


def load_decode_vae(config: DecodeConfig) -> vae.WanVae:
    """Read the VAE onto the device."""
    folder = locate_model(config.model, ("vae",))
    return vae.load_vae(folder, dtype=getattr(torch, config.vae_dtype), device=pick_device(config.device))


def decode_step(config: DecodeConfig, model: vae.WanVae, group: LatentGroup, folder: Path) -> list[Path]:
    """Write the videos of one step and their contact sheet; the files made."""
    files, sheet_rows = [], []
    for row in track_progress(range(len(group.keys)), total=len(group.keys), label="decode"):
        pixels = decode_latent_row(model, Path(config.latents), group, row)
        files.append(write_video(folder / f"{group.keys[row]}.mp4", pixels, fps=group.spec.fps))
        if row < MAX_SHEET_ROWS:
            sheet_rows.append(make_thumbnails(pixels, columns=config.columns))
    return [*files, write_contact_sheet(folder / CONTACT_SHEET, sheet_rows)]


def write_contact_sheet(path: Path, rows: Sequence[numpy.ndarray]) -> Path:
    """Write rows of pictures, one below the other, as a PNG file; whole or not at all."""
    data = io.BytesIO()
    Image.fromarray(numpy.concatenate(rows)).save(data, format="PNG")
    write_file(path, data.getbuffer())
    return path


def decode_latent_row(model: vae.WanVae, store: Path, group: LatentGroup, row: int) -> numpy.ndarray:
    """Decode one video (F X Y 3) uint8; ValueError where its latents are damaged."""
    video = latent_store.read_latents(store, group.step, row)
    if not torch.isfinite(video).all():
        raise ValueError(f"latents={store}: {group.step}/{group.keys[row]} is not finite")
    return vae.decode_video(model, video).numpy()


def make_thumbnails(pixels: numpy.ndarray, *, columns: int) -> numpy.ndarray:
    """Evenly spaced frames of a video (F X Y 3), first and last included, side by side, (x columns*y 3) uint8."""
    frame_indices = numpy.linspace(0, len(pixels) - 1, columns).round().astype(int)
    height, width = pixels.shape[1:3]
    size = (min(width, THUMBNAIL_WIDTH), round(height * min(1.0, THUMBNAIL_WIDTH / width)))
    return numpy.concatenate(
        [numpy.asarray(Image.fromarray(pixels[index]).resize(size)) for index in frame_indices], axis=1
    )


def decode_as_written(config: DecodeConfig) -> Iterator[Path]:
    """Decode each finished step into a folder of its own and give its contact sheet, until the run says it has ended.

    A step whose contact sheet is there is not decoded again. The store may not be there yet.
    """
    store, out = Path(config.latents), Path(config.out)
    check_video_folder(out, complete_steps(store))
    model = load_decode_vae(config)
    out.mkdir(parents=True, exist_ok=True)
    write_config(out / DECODE_CONFIG_FILE, config)
    while True:
        is_complete = latent_store.is_store_complete(store)  # asked before looking, so that the last step is not missed
        for step in undecoded_steps(store, out):
            (out / step).mkdir(exist_ok=True)
            yield decode_step(config, model, latent_store.describe_group(store, step), out / step)[-1]
        if is_complete:
            return
        time.sleep(POLL_SECONDS)


def complete_steps(store: Path) -> list[str]:
    """Finished steps of the store; none where it is not there yet."""
    return latent_store.complete_groups(store) if (store / "zarr.json").is_file() else []


def undecoded_steps(store: Path, out: Path) -> list[str]:
    """Finished steps of the store without a contact sheet."""
    return [step for step in complete_steps(store) if not (out / step / CONTACT_SHEET).is_file()]
