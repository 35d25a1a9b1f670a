"""Finds a student by name: a checkpoint of this project, or weights of another program, with the facts about it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.model_folder import fingerprint_part, locate_model, locate_part, same_fingerprint
from common.video import VideoSpec, parse_frame_size
from stage2_distill.checkpointing.format import (
    BEST_FILE,
    SAMPLER_KIND,
    STUDENT_FILE,
    StudentFacts,
    list_checkpoints,
    newest_checkpoint,
    read_facts,
    resolve_checkpoint,
)
from stage2_distill.config import DistillConfig
from stage2_distill.model.lora import lora_settings
from stage2_distill.weight_files.lora_files import LoraFile, digest_lora, parse_loras
from stage2_distill.weight_files.model_kind import is_lora
from stage2_distill.weight_files.stored_weights import WEIGHT_SUFFIXES, locate_weights, read_raw_table, weight_files

BASE_PARTS = ("transformer", "vae", "text_encoder")  # in the order of the fields of StudentFacts


@dataclass(frozen=True)
class StudentSource:
    """Where a student's weights are, and how to sample from them."""

    path: Path  # of a checkpoint, or of a file or folder of weights
    facts: StudentFacts
    loras: tuple[LoraFile, ...] = ()  # the student itself, if it is a LoRA file on the base

    @property
    def own_path(self) -> Path:
        """The checkpoint, file or folder that makes this student different from others."""
        return self.loras[0].path if self.loras else self.path


def find_student(name: str, model: str, *, spec: VideoSpec | None = None, best: bool = True) -> StudentSource:
    """The student `name`: a run or checkpoint, a file or folder of weights, a LoRA file on `model`, or a hub name.

    Weights of another program are taken to belong to `model`; what a file does not say of its timesteps and sizes is
    that of the reference, or `spec`. Of a run its best checkpoint, else its newest. ValueError if there is none.
    """
    folder = Path(name)
    if (folder / STUDENT_FILE).is_file() or (folder / BEST_FILE).is_file() or list_checkpoints(folder):
        checkpoint = resolve_checkpoint(folder) if best else newest_checkpoint(folder)
        return StudentSource(checkpoint, read_facts(checkpoint))
    if not holds_weights(folder):
        newest_checkpoint(folder)  # raises: says what is missing
    path = locate_weights(name, option="checkpoint")
    if path.is_dir() and len(files := weight_files(path)) == 1:
        (path,) = files  # such as checkpoint_model_000500/model.pt
    names, metadata = read_raw_table(path) if path.is_file() else ({}, {})
    facts = foreign_facts(name, model, metadata, spec)
    if is_lora(names):
        base = locate_part(locate_model(model, ("transformer",)), "transformer")
        return StudentSource(base, facts, (LoraFile(path),))
    return StudentSource(path, facts)


def holds_weights(path: Path) -> bool:
    """Whether a path is a file, or a folder with weights of another program or a hub's repository."""
    if not path.is_dir():
        return path.exists() or len(path.parts) == 2  # OWNER/NAME of the hub
    return (path / "transformer").is_dir() or any(file.suffix in WEIGHT_SUFFIXES for file in path.iterdir())


def foreign_facts(name: str, model: str, metadata: Mapping[str, str], spec: VideoSpec | None) -> StudentFacts:
    """Facts about weights of another program: those in the metadata of our exports, else the reference's."""
    folder = locate_model(model, ("transformer",))
    paths = [locate_part(folder, part) for part in BASE_PARTS]
    transformer, vae, text = (fingerprint_part(path) if path.exists() else "" for path in paths)
    options: dict[str, object] = {"guidance_scale": DistillConfig.guidance_scale}
    timesteps, shift, size = DistillConfig.timesteps, DistillConfig.shift, spec or VideoSpec()
    facts = StudentFacts(0, timesteps, shift, SAMPLER_KIND, size, model, transformer, vae, text, options)
    if metadata.get("sampler") == SAMPLER_KIND:
        return stated_facts(name, facts, metadata)
    shown = ",".join(f"{timestep:g}" for timestep in timesteps)
    logging.info("%s: does not name its timesteps; using %s and shift %g, the reference's", name, shown, shift)
    return facts


def stated_facts(name: str, facts: StudentFacts, metadata: Mapping[str, str]) -> StudentFacts:
    """Facts with what the metadata of an export state; ValueError if they cannot be read."""
    try:
        frames, height, width = (int(part) for part in metadata["size"].split("x"))
        return replace(
            facts,
            ladder=tuple(float(part) for part in metadata["timesteps"].split(",")),
            shift=float(metadata["shift"]),
            spec=VideoSpec(frames, height, width, int(metadata["fps"])),
            sizes=tuple(parse_frame_size(part) for part in split_list(metadata, "sizes")),
            lengths=tuple(int(part) for part in split_list(metadata, "lengths")),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"checkpoint={name}: its metadata cannot be read ({error}); export it again") from error


def split_list(metadata: Mapping[str, str], name: str) -> list[str]:
    """The parts of a value with commas; none if it is missing."""
    return metadata[name].split(",") if metadata.get(name) else []


def trained_loras(facts: StudentFacts) -> tuple[LoraFile, ...]:
    """The LoRA files that were added to the base before the distillation; ValueError if one has other content now."""
    stored = facts.config.get("base_lora") or ()
    assert isinstance(stored, Sequence), stored
    loras = parse_loras([str(one) for one in stored])
    for lora, digest in zip(loras, facts.base_loras, strict=False):  # earlier checkpoints have no digests
        if digest_lora(lora.path) != digest:
            raise ValueError(f"base_lora={lora.path}: has changed since the distillation; restore it from a copy")
    return loras


def check_base(model: str, facts: StudentFacts) -> None:
    """Raise ValueError if a model's transformer is not the student's base.

    If that was a file of weights, which has no VAE to sample with, a student that has all weights of its own takes any
    model of the same shapes.
    """
    if lora_settings(facts.config) is not None or Path(facts.base_model).suffix not in WEIGHT_SUFFIXES:
        check_model(model, facts, ("transformer",))


def check_sampler(folder: Path, facts: StudentFacts) -> None:
    """Raise ValueError if the student of a checkpoint needs another sampler than this version's."""
    if facts.sampler != SAMPLER_KIND:
        raise ValueError(
            f"{folder}: needs the sampler {facts.sampler}, which this version does not have; use a newer one"
        )


def check_model(model: str, facts: StudentFacts, parts: Sequence[str]) -> None:
    """Raise ValueError if a part of a model is not the one that the student was distilled with."""
    for part in parts:
        given, distilled = fingerprint_part(locate_part(locate_model(model, (part,)), part)), str(vars(facts)[part])
        if not same_fingerprint(given, distilled):
            raise ValueError(
                f"model={model}: its {part} is not the one of the distillation (fingerprint {given}, was {distilled}); "
                f"use {facts.base_model}"
            )
