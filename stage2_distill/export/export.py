"""The command `export`: a checkpoint's student as files of another program, with a model card.

The folder is made complete under another name and renamed last, so that it exists completely or not at all.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from common.device import pick_device
from common.model_folder import locate_model, locate_part
from common.progress import track_progress
from common.video import VideoSpec
from shards.dataset import open_data_set
from shards.manifest import check_settings
from shards.record import Record
from stage2_distill.checkpointing.format import StudentFacts
from stage2_distill.export.config import DIFFUSERS, LORA, ExportConfig
from stage2_distill.export.diffusers_folder import COPIED_PARTS, write_diffusers_folder, write_scheduler
from stage2_distill.export.lora_file import write_adapter, write_low_rank
from stage2_distill.export.model_card import CardFacts, find_licence, render_card, report_lines
from stage2_distill.export.student_weights import STORED_PREFIX, StudentWeights, cast_weight, open_student_weights
from stage2_distill.export.wan_file import sampling_metadata, write_wan_file, write_workflows
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.sampling.student_sampler import StudentSampler, load_student
from stage2_distill.sampling.student_source import check_model
from stage2_distill.weight_files.lora_files import LoraFile
from stage2_distill.weight_files.transformer_config import HEADS_KEY, read_transformer_config

CARD_FILE = "README.md"


def export_student(config: ExportConfig) -> Path:
    """Write the files of one format into a new folder; returns the folder."""
    out = Path(config.out)
    parts: Sequence[str] = ("transformer", *COPIED_PARTS) if config.format == DIFFUSERS else ("transformer",)
    model = locate_model(config.model, parts)
    student = open_student_weights(config.checkpoint, config.model, config.weights)
    with new_folder(out) as folder:
        check_options(config, student)
        licence = find_licence(student.facts.base_model, model)
        card = CardFacts(config, out.resolve().name, student.checkpoint, student.facts, licence)
        if config.format == DIFFUSERS:
            check_model(config.model, student.facts, ("vae", "text_encoder"))
            dtype = getattr(torch, config.dtype)
            tensors = ((name, cast_weight(name, weight, dtype)) for name, weight in student.read_weights())
            write_diffusers_folder(folder, model, student.facts, tensors, student.shapes(dtype))
        else:
            card = write_single_file(folder, card, student)
        (folder / CARD_FILE).write_text(render_card(card), encoding="utf-8")
    return out


def check_options(config: ExportConfig, student: StudentWeights) -> None:
    """Raise ValueError, before weights are read, for a bad report or data set, or a rank that is missing or surplus."""
    if config.report is not None:
        report_lines(Path(config.report))
    if config.shards is not None:
        read_records(config, student.facts)
    if config.format != LORA:
        return
    if student.adapters is None and config.rank is None:
        raise ValueError(f"format={LORA}: {student.checkpoint} has all weights trained; give --rank, such as 64")
    if student.adapters is not None and config.rank is not None:
        own = student.adapters.rank
        raise ValueError(f"rank={config.rank}: {student.checkpoint} has adapters of rank {own} already; leave it out")


def write_single_file(folder: Path, card: CardFacts, student: StudentWeights) -> CardFacts:
    """Write a file of the formats wan or lora with its workflows; returns the card with what is lost."""
    config, facts, dtype = card.config, card.facts, getattr(torch, card.config.dtype)
    metadata = sampling_metadata(facts, card.base, card.licence, read_heads(config.model))
    is_lora = config.format == LORA
    path = folder / f"{card.name}.safetensors"
    write_workflows(folder, card.name, facts, is_lora=is_lora)
    if not is_lora:
        tensors = ((name, cast_weight(name, weight, dtype)) for name, weight in student.read_weights())
        write_wan_file(folder, card.name, tensors, student.shapes(dtype), metadata)
        return card
    write_scheduler(folder / "scheduler", facts)
    if config.rank is None:
        logging.info("%d pairs", write_adapter(path, student, dtype, metadata))
        return card
    errors = write_low_rank(path, student, config.rank, dtype, metadata, pick_device(config.device))
    logging.info("rank %d keeps %.2f %% of the energy", errors.rank, 100 * errors.kept_energy)
    return replace(card, errors=errors, latent_error=measure_latents(path, card) if config.shards else None)


def read_heads(model: str) -> int:
    """Number of attention heads of a base's transformer."""
    return int(read_transformer_config(locate_part(locate_model(model, ("transformer",)), "transformer"))[HEADS_KEY])


def measure_latents(path: Path, card: CardFacts) -> float:
    """Norm of the difference of latents sampled with a file on the base and with the student, relative to the latter.

    Both sample the same records of a data set from the same noise, in float32.
    """
    config, facts = card.config, card.facts
    records, device = read_records(config, facts), pick_device(config.device)
    base = locate_part(locate_model(config.model, ("transformer",)), "transformer")
    sampled = []
    for source, loras in ((card.checkpoint, ()), (base, (LoraFile(path),))):
        net = load_student(
            source, ExecutionPlan(), model=config.model, weights=STORED_PREFIX[config.weights], dtype=torch.float32,
            device=device, loras=loras,
        )  # fmt: skip
        label = "sample with the file" if loras else "sample the student"
        seeded = track_progress(enumerate(records), total=len(records), label=label)
        latents = []
        for seed, (spec, record) in seeded:
            latents.append(StudentSampler(net, spec, facts.sigmas, torch.float32)([record], [seed]).cpu().flatten())
        sampled.append(torch.cat(latents))
    student, approximation = sampled
    return float((approximation - student).norm() / student.norm())


def read_records(config: ExportConfig, facts: StudentFacts) -> list[tuple[VideoSpec, Record]]:
    """The first records of each size that the student knows, in turn, with the shape of their videos.

    ValueError if there are none, or if their frame rate is another.
    """
    data = open_data_set(str(config.shards))
    check_settings(str(config.shards), data.manifest, {"fps": facts.spec.fps})
    groups = [group for group in data.size_groups if group.spec.frame_size in facts.frame_sizes]
    if not groups:
        found = ", ".join(str(group.spec.frame_size) for group in data.size_groups)
        known = ", ".join(map(str, facts.frame_sizes))
        raise ValueError(f"shards={config.shards}: has records of {found}, and the student was trained on {known}")
    turns = [(group, index) for index in range(config.num_records) for group in groups if index < group.num_records]
    frames = facts.spec.num_frames
    return [
        (replace(group.spec, num_frames=frames), data.read_record(group.record_index(index)))
        for group, index in turns[: config.num_records]
    ]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, or vanishes after an error; ValueError if `out` exists."""
    if out.exists():
        raise ValueError(f"out={out}: exists already; give a new folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing after the rename
