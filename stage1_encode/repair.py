"""After `verify`: encode what it reported as broken again, and draw the first frames of a data set."""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from common.device import pick_device
from common.files import FolderLock, write_file
from common.model_folder import fingerprint_part, locate_model, locate_part, same_fingerprint
from common.options import resolve_config
from shards.dataset import DataSet, open_data_set
from shards.manifest import MANIFEST_FILE
from shards.record import Record
from shards.verification.check_settings import settings_differences
from shards.verification.statistics import VerifyReport
from shards.verification.verify import delete_broken_files
from stage1_encode.config import EncodeConfig, VerifyConfig
from stage1_encode.dataset_folder import (
    ENCODE_CONFIG_FILE,
    LOCK_FILE,
    PLAN_FILE,
    DataSetFolder,
    EncodingPlan,
    check_plan,
    make_encoding_plan,
    write_plan,
)
from stage1_encode.encode import EncodeReport, encode
from stage1_encode.imported_latents.latent_source import read_rows
from stage1_encode.models import vae
from stage1_encode.pipeline import ENCODER_PARTS

MAX_PICTURES, PICTURES_PER_ROW = 64, 8  # on a contact sheet
CELL_WIDTH, LABEL_HEIGHT = 240, 14  # in pixels


def repair_data_set(report: VerifyReport, config: VerifyConfig) -> EncodeReport:
    """Delete the broken files of a local data set and encode them again, with the options stored in its folder.

    Raises ValueError, before anything is deleted, if those options, the CSV or the model no longer fit the data set.
    """
    folder = Path(report.location)
    if not folder.is_dir():
        raise ValueError(f"shards={report.location}: only a local folder is repaired; copy it, or encode it again")
    for problem in report.problems:
        if problem.file == ENCODE_CONFIG_FILE:
            raise ValueError(f"shards={report.location}: {problem}")
    options = original_config(folder, config)
    plan = make_encoding_plan(options, locate_model(options.model, ENCODER_PARTS))
    broken_files = {problem.file for problem in report.problems}
    plan = restore_plan(report, plan) if PLAN_FILE in broken_files else check_plan(folder, plan)
    pick_device(options.device)
    rows = read_rows(options)
    with FolderLock(folder, LOCK_FILE, permanent=True) as lock:
        data_set = DataSetFolder(folder, options, plan, lock)
        data_set.survey_rows(rows, broken_files=broken_files)
        if PLAN_FILE in broken_files:
            write_plan(folder, plan)
    delete_broken_files(report)  # only now: everything that `encode` would refuse has been checked
    return encode(options)


def restore_plan(report: VerifyReport, plan: EncodingPlan) -> EncodingPlan:
    """The plan of a data set whose own is damaged, from its options; ValueError if its manifest says another thing."""
    manifest = report.manifest
    if manifest is None:
        raise ValueError(f"shards={report.location}: {PLAN_FILE} and {MANIFEST_FILE} are both damaged; encode it again")
    differences = settings_differences(manifest, plan.spec, plan.encoder, plan.sizes)
    if differences:
        raise ValueError(
            f"shards={report.location}: was made with other settings: {'; '.join(differences)}; give that model"
        )
    return replace(plan, encoder=manifest.encoder)


def original_config(folder: Path, config: VerifyConfig) -> EncodeConfig:
    """The options with which a data set was encoded, for its present folder and `config`'s model and device."""
    if not (folder / ENCODE_CONFIG_FILE).is_file():
        raise ValueError(f"shards={folder}: holds no {ENCODE_CONFIG_FILE}; encode it again")
    options = {"config": str(folder / ENCODE_CONFIG_FILE), "out": str(folder), "model": config.model}
    options |= {"data": config.data, "base_folder": config.base_folder}
    encode_config = resolve_config(EncodeConfig, options)
    # The exit code of a repair does not depend on rows that failed before.
    return replace(encode_config, shard_range="", engine="local", max_failure_rate=1.0, device=config.device)


def draw_contact_sheet(report: VerifyReport, config: VerifyConfig) -> Path:
    """Decode first frames, evenly spread over a data set, into one image with their keys; returns its path.

    Broken records and records without a first frame are omitted. ValueError if `model` has another VAE.
    """
    assert config.model and config.sheet, config
    folder, data = locate_model(config.model, ("vae",)), open_data_set(report.location)
    if not same_fingerprint(fingerprint_part(locate_part(folder, "vae")), data.manifest.encoder.vae):
        raise ValueError(
            f"model={config.model}: its VAE is not the one that {report.location} was made with; give that one"
        )
    model = vae.load_vae(folder, dtype=torch.float32, device=pick_device(config.device))
    has_many_sizes = len(data.size_groups) > 1
    cells = [draw_cell(model, record, limit_height=has_many_sizes) for record in evenly_spaced_records(data)]
    if not cells:
        raise ValueError(f"shards={report.location}: no record has a first frame to show; leave --model out")
    height = max(len(cell) for cell in cells)  # lower ones stand on the same line, under white
    cells = [numpy.pad(cell, ((height - len(cell), 0), (0, 0), (0, 0)), constant_values=255) for cell in cells]
    cells += [numpy.full_like(cells[0], 255)] * (-len(cells) % PICTURES_PER_ROW)  # white cells complete the last row
    pixels = rearrange(numpy.stack(cells), "(row column) x y c -> (row x) (column y) c", column=PICTURES_PER_ROW)
    path, sheet = Path(config.sheet), io.BytesIO()
    Image.fromarray(pixels).save(sheet, format="PNG" if path.suffix == ".png" else "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, sheet.getbuffer())
    return path


def evenly_spaced_records(data: DataSet) -> Iterator[Record]:
    """Up to `MAX_PICTURES` records with a first frame, as many of each size, evenly spread; broken ones are skipped."""
    count = max(1, MAX_PICTURES // len(data.size_groups))
    for group in data.size_groups:
        for index in numpy.unique(numpy.linspace(0, group.num_records - 1, count).round().astype(int)).tolist():
            with suppress(ValueError, OSError):  # verify has reported it
                record = data.read_record(group.record_index(index))
                if record.first_frame is not None:
                    yield record


def draw_cell(model: vae.WanVae, record: Record, *, limit_height: bool) -> numpy.ndarray:
    """One record's picture above its key: (X Y 3) uint8, Y = `CELL_WIDTH`; with a limit, X is about as much at most."""
    assert record.first_frame is not None
    picture = Image.fromarray(vae.decode_video(model, record.first_frame)[0].numpy())
    scale = CELL_WIDTH / (max(picture.size) if limit_height else picture.width)
    width, height = round(picture.width * scale), round(picture.height * scale)
    image = Image.new("RGB", (CELL_WIDTH, height + LABEL_HEIGHT), "white")
    image.paste(picture.resize((width, height)), (0, 0))
    label = f"{record.key} {picture.height}x{picture.width}" if limit_height else record.key
    ImageDraw.Draw(image).text((2, height), label, fill="black")
    return numpy.asarray(image)
