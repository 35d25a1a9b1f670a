"""Checkpoints: a folder `step-000500` of safetensors shards, complete or not there.

Tensors are written with torch's distributed checkpoint in its safetensors form, so any number of ranks reads what
any other number wrote, and nothing is pickled. `student.json` says what the student is, `index.json` what the files
are; the folder gets its name last (`writer.py`).
"""

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.files import write_file
from common.flow import timestep_sigmas
from common.video import VideoSpec

STUDENT, INDEX, BEST = "student.json", "index.json", "best"
NAME = re.compile(r"step-(\d{6,})")
READERS = 4  # threads that hash files
SAMPLER = "renoise"  # x0, then fresh noise at the next sigma


@dataclass(frozen=True)
class FileFacts:
    """What a file of a checkpoint is."""

    size: int  # bytes
    sha256: str


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
    position: int = 0  # of the stream: records read
    memory: str = ""  # the form in which the roles were trained; checkpoints made before it was written down lack it

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ladder's noise levels."""
        return timestep_sigmas(self.ladder, s=self.shift)


def step_folder(run: Path, iteration: int) -> Path:
    """Folder of the checkpoint after `iteration` iterations."""
    return run / f"step-{iteration:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (path.parent for path in run.glob(f"step-*/{STUDENT}"))
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=iteration_of)


def iteration_of(folder: Path) -> int:
    """The number in a step folder's name."""
    return int(folder.name.removeprefix("step-"))


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


def file_facts(path: Path) -> FileFacts:
    """What a file is, read from the disk."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_index(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Write down what the files of a checkpoint are."""
    facts = {name: asdict(files[name]) for name in sorted(files)}
    write_file(folder / INDEX, (json.dumps(facts, indent=1) + "\n").encode())


def damage(checkpoint: Path, *, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None where every byte is as it was written.

    Of several ranks each reads its share of the files.
    """
    try:
        stated = {name: FileFacts(**facts) for name, facts in json.loads((checkpoint / INDEX).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{INDEX} cannot be read ({error})"
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: file_damage(checkpoint / name, stated[name]), sorted(stated)[rank::world])
        return next((problem for problem in found if problem is not None), None)


def file_damage(path: Path, stated: FileFacts) -> str | None:
    """What is wrong with a file of a checkpoint, in words; None where nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != stated.size:
        return f"{path.name} has {path.stat().st_size} bytes, {stated.size} were written"
    return None if file_facts(path) == stated else f"{path.name} has other bytes than were written"


def set_aside(run: Path, *, after: int) -> None:
    """Rename the checkpoints of later iterations, damaged as they are, and remove what was never finished."""
    for folder in run.glob("step-*"):
        if folder.suffix == ".partial":
            shutil.rmtree(folder)
        elif NAME.fullmatch(folder.name) and iteration_of(folder) > after:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint, each in its own dtype.

    Raises ValueError where it lacks one, or cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
        except CheckpointException as error:
            raise ValueError(f"{checkpoint}: does not give what is needed of it ({reason(error)})") from error


def held(checkpoint: Path) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors of a checkpoint."""
    found = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: entry.properties.dtype for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def reason(error: BaseException) -> str:
    """The first cause in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints, every `keep_every` iterations' (0: none), and the best."""
    best = json.loads((run / BEST).read_bytes())["checkpoint"] if (run / BEST).is_file() else None
    for old in checkpoints(run)[:-keep]:
        if old.name != best and not (keep_every and iteration_of(old) % keep_every == 0):
            going = old.with_name(old.name + ".partial")  # so that a kill leaves nothing that looks whole
            old.replace(going)
            shutil.rmtree(going)
