"""After `verify`: encode again what it found broken, and draw what the good records show."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from common.device import pick_device
from common.model_folder import fingerprint_folder, locate_model
from common.options import resolve_config
from shards.dataset import DataSet, open_data_set
from shards.record import Record
from shards.verification.statistics import VerifyReport
from shards.verification.verify import delete_broken_files
from stage1_encode.config import EncodeConfig, VerifyConfig
from stage1_encode.dataset_folder import ENCODE_CONFIG_FILE, check_plan, make_encoding_plan, survey_shards
from stage1_encode.encode import EncodeReport, encode
from stage1_encode.models import vae
from stage1_encode.pipeline import ENCODER_PARTS

MAX_PICTURES, PICTURES_PER_ROW, CELL_WIDTH, LABEL_HEIGHT = (
    64,
    8,
    240,
    14,
)  # pictures on a sheet, and pixels in width and of a key's line


def repair_data_set(report: VerifyReport, config: VerifyConfig) -> EncodeReport:
    """Encode again just what is broken in a local data set, by the command that made it.

    Raises ValueError where that command cannot run any more; nothing is deleted then.
    """
    folder = Path(report.location)
    if not folder.is_dir():
        raise ValueError(f"shards={report.location}: only a local folder is repaired; copy it, or encode it again")
    encode_config = original_config(folder, config)
    check_plan(folder, make_encoding_plan(encode_config, locate_model(encode_config.model, ENCODER_PARTS)))
    pick_device(encode_config.device)
    sidecars = {problem.file for problem in report.problems if problem.shard and problem.file != problem.shard}
    with moved_aside([folder / name for name in sorted(sidecars)]):
        survey_shards(folder, encode_config)  # do the sound sidecars still belong to this CSV?
    delete_broken_files(report)
    return encode(encode_config)


@contextmanager
def moved_aside(paths: Sequence[Path]) -> Iterator[None]:
    """Give files that are there another name for a while."""
    moved = {path: path.with_name(path.name + ".partial") for path in paths if path.is_file()}
    for path, partial in moved.items():
        path.replace(partial)
    try:
        yield
    finally:
        for path, partial in moved.items():
            partial.replace(path)


def original_config(folder: Path, config: VerifyConfig) -> EncodeConfig:
    """The options that a data set was made with, for the folder where it lies now."""
    if not (folder / ENCODE_CONFIG_FILE).is_file():
        raise ValueError(f"shards={folder}: holds no {ENCODE_CONFIG_FILE}; encode it again")
    encode_config = resolve_config(
        EncodeConfig, {"config": str(folder / ENCODE_CONFIG_FILE), "out": str(folder), "model": config.model}
    )
    return replace(encode_config, shard_range="", engine="local", max_failure_rate=1.0, device=config.device)


def draw_contact_sheet(report: VerifyReport, config: VerifyConfig) -> Path:
    """Decode first frames, evenly spread over a data set, into one picture with their keys; its path.

    Broken records and those without a first frame are left out. ValueError where `model` has another VAE.
    """
    assert config.model, config
    folder = locate_model(config.model, ("vae",))
    data = open_data_set(report.location)
    if fingerprint_folder(folder / "vae") != data.manifest.encoder.vae:
        raise ValueError(f"model={config.model}: its VAE is not the one that {report.location} was made with")
    model = vae.load_vae(folder, dtype=torch.float32, device=pick_device(config.device))
    cells = [draw_cell(model, record) for record in evenly_spaced_records(data)]
    if not cells:
        raise ValueError(f"shards={report.location}: no record has a first frame to show")
    cells += [numpy.full_like(cells[0], 255)] * (-len(cells) % PICTURES_PER_ROW)
    pixels = rearrange(numpy.stack(cells), "(row column) x y c -> (row x) (column y) c", column=PICTURES_PER_ROW)
    path = Path(config.sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def evenly_spaced_records(data: DataSet) -> Iterator[Record]:
    """Up to `MOST` records with a first frame, evenly spread; those that cannot be read are left out."""
    for index in numpy.unique(numpy.linspace(0, data.num_records - 1, MAX_PICTURES).round().astype(int)).tolist():
        with suppress(ValueError, OSError):  # verify has named it
            record = data.read_record(index)
            if record.first_frame is not None:
                yield record


def draw_cell(model: vae.WanVae, record: Record) -> numpy.ndarray:
    """One record's picture over its key (X Y 3) uint8."""
    assert record.first_frame is not None
    picture = Image.fromarray(vae.decode_video(model, record.first_frame)[0].numpy())
    height = round(picture.height * CELL_WIDTH / picture.width)
    image = Image.new("RGB", (CELL_WIDTH, height + LABEL_HEIGHT), "white")
    image.paste(picture.resize((CELL_WIDTH, height)), (0, 0))
    ImageDraw.Draw(image).text((2, height), record.key, fill="black")
    return numpy.asarray(image)
