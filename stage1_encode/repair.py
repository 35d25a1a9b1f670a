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
from stage1_encode.dataset_folder import CONFIG, check_plan, make_plan, survey
from stage1_encode.encode import EncodeReport, encode
from stage1_encode.models import vae
from stage1_encode.pipeline import PARTS

MOST, COLUMNS, CELL, LABEL = 64, 8, 240, 14  # pictures on a sheet, and pixels in width and of a key's line


def mend(report: VerifyReport, config: VerifyConfig) -> EncodeReport:
    """Encode again just what is broken in a local data set, by the command that made it.

    Raises ValueError where that command cannot run any more; nothing is deleted then.
    """
    folder = Path(report.where)
    if not folder.is_dir():
        raise ValueError(f"shards={report.where}: only a local folder is repaired; copy it, or encode it again")
    asked = command_of(folder, config)
    check_plan(folder, make_plan(asked, locate_model(asked.model, PARTS)))
    pick_device(asked.device)
    sidecars = {problem.file for problem in report.problems if problem.shard and problem.file != problem.shard}
    with aside([folder / name for name in sorted(sidecars)]):
        survey(folder, asked)  # do the sound sidecars still belong to this CSV?
    delete_broken_files(report)
    return encode(asked)


@contextmanager
def aside(paths: Sequence[Path]) -> Iterator[None]:
    """Give files that are there another name for a while."""
    moved = {path: path.with_name(path.name + ".partial") for path in paths if path.is_file()}
    for path, partial in moved.items():
        path.replace(partial)
    try:
        yield
    finally:
        for path, partial in moved.items():
            partial.replace(path)


def command_of(folder: Path, config: VerifyConfig) -> EncodeConfig:
    """The options that a data set was made with, for the folder where it lies now."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"shards={folder}: holds no {CONFIG}; encode it again")
    made = resolve_config(EncodeConfig, {"config": str(folder / CONFIG), "out": str(folder), "model": config.model})
    return replace(made, shards="", engine="local", max_failures=1.0, device=config.device)


def draw_sheet(report: VerifyReport, config: VerifyConfig) -> Path:
    """Decode first frames, evenly spread over a data set, into one picture with their keys; its path.

    Broken records and those without a first frame are left out. ValueError where `model` has another VAE.
    """
    assert config.model, config
    folder = locate_model(config.model, ("vae",))
    data = open_data_set(report.where)
    if fingerprint_folder(folder / "vae") != data.manifest.encoder.vae:
        raise ValueError(f"model={config.model}: its VAE is not the one that {report.where} was made with")
    model = vae.load(folder, dtype=torch.float32, device=pick_device(config.device))
    cells = [cell(model, record) for record in some_records(data)]
    if not cells:
        raise ValueError(f"shards={report.where}: no record has a first frame to show")
    cells += [numpy.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    pixels = rearrange(numpy.stack(cells), "(row column) x y c -> (row x) (column y) c", column=COLUMNS)
    path = Path(config.sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def some_records(data: DataSet) -> Iterator[Record]:
    """Up to `MOST` records with a first frame, evenly spread; those that cannot be read are left out."""
    for place in numpy.unique(numpy.linspace(0, data.records - 1, MOST).round().astype(int)).tolist():
        with suppress(ValueError, OSError):  # verify has named it
            record = data.record(place)
            if record.first_frame is not None:
                yield record


def cell(model: vae.Vae, record: Record) -> numpy.ndarray:
    """One record's picture over its key (X Y 3) uint8."""
    assert record.first_frame is not None
    picture = Image.fromarray(vae.decode_video(model, record.first_frame)[0].numpy())
    height = round(picture.height * CELL / picture.width)
    made = Image.new("RGB", (CELL, height + LABEL), "white")
    made.paste(picture.resize((CELL, height)), (0, 0))
    ImageDraw.Draw(made).text((2, height), record.key, fill="black")
    return numpy.asarray(made)
