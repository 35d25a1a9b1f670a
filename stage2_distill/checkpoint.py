"""Checkpoints: a folder `step-000500` of safetensors shards, complete or not there.

Tensors are written with torch's distributed checkpoint in its safetensors form, so any number of ranks reads what
any other number wrote, and nothing is pickled. `student.json` says what the student is; the folder gets its name last.
"""

import json
import logging
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from common.flow import ladder
from common.video import VideoSpec
from shards.manifest import write_file

STUDENT, BEST = "student.json", "best"
SAMPLER = "renoise"  # x0, then fresh noise at the next sigma


@dataclass(frozen=True)
class StudentFacts:
    """What a sampler must know of a checkpoint."""

    iteration: int  # iterations done
    ladder: tuple[float, ...]
    shift: float
    sampler: str
    spec: VideoSpec
    base_model: str
    transformer: str  # fingerprint of the base model's transformer
    vae: str  # fingerprint of the VAE that made the latents
    text_encoder: str
    config: dict[str, object]

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ladder's noise levels."""
        return ladder(self.ladder, s=self.shift)


def step_folder(run: Path, iteration: int) -> Path:
    """Folder of the checkpoint after `iteration` iterations."""
    return run / f"step-{iteration:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (path.parent for path in run.glob(f"step-*/{STUDENT}"))
    return sorted((path for path in found if path.suffix != ".partial"), key=lambda path: int(path.name[5:]))


def newest(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest of the run that it is; ValueError where there is none."""
    if (folder / STUDENT).is_file():
        return folder
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"checkpoint={folder}: holds no checkpoint (step-*/{STUDENT})")
    return found[-1]


def chosen(folder: Path) -> Path:
    """The checkpoint that `folder` is, or of a run the one in its file `best`, or its newest; a log line says which."""
    if (folder / STUDENT).is_file() or not (folder / BEST).is_file():
        return newest(folder)
    best = folder / str(json.loads((folder / BEST).read_bytes())["checkpoint"])
    if not (best / STUDENT).is_file():
        raise ValueError(f"checkpoint={folder}: its best, {best.name}, is gone; run evaluate --select again")
    logging.info("%s: using %s, the best by evaluate --select", folder, best.name)
    return best


def write_best(run: Path, name: str, *, distance: float, iteration: int) -> Path:
    """Say in the file `best` which step folder of a run is to be used."""
    facts = {"checkpoint": name, "distance": distance, "iteration": iteration}
    write_file(run / BEST, (json.dumps(facts, indent=1) + "\n").encode())
    return run / BEST


def read_facts(checkpoint: Path) -> StudentFacts:
    """What the student of a checkpoint is."""
    fields = json.loads((checkpoint / STUDENT).read_bytes())
    fields["spec"] = VideoSpec(**fields["spec"])
    fields["ladder"] = tuple(fields["ladder"])
    return StudentFacts(**fields)


def save(run: Path, tensors: dict[str, Tensor], facts: StudentFacts) -> Path:
    """Write a checkpoint; all ranks call it together."""
    folder = step_folder(run, facts.iteration)
    partial = folder.with_name(folder.name + ".partial")
    first = dist.get_rank() == 0
    if first and partial.exists():
        shutil.rmtree(partial)
    dist.barrier()
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    if first:
        write_file(partial / STUDENT, (json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n").encode())
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    dist.barrier()
    return folder


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint; names that the checkpoint lacks are an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one in the file `best`."""
    best = json.loads((run / BEST).read_bytes())["checkpoint"] if (run / BEST).is_file() else None
    for old in checkpoints(run)[:-keep]:
        if old.name != best:
            shutil.rmtree(old)
