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

STUDENT_FILE, INDEX_FILE, BEST_FILE = "student.json", "index.json", "best"
STEP_FOLDER_PATTERN = re.compile(r"step-(\d{6,})")
HASH_THREADS = 4  # threads that hash files
SAMPLER_KIND = "renoise"  # x0, then fresh noise at the next sigma


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


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (path.parent for path in run.glob(f"step-*/{STUDENT_FILE}"))
    return sorted((path for path in folders if STEP_FOLDER_PATTERN.fullmatch(path.name)), key=iteration_of)


def iteration_of(folder: Path) -> int:
    """The number in a step folder's name."""
    return int(folder.name.removeprefix("step-"))


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest of the run that it is; ValueError where there is none."""
    if (folder / STUDENT_FILE).is_file():
        return folder
    folders = list_checkpoints(folder)
    if not folders:
        raise ValueError(f"checkpoint={folder}: holds no checkpoint (step-*/{STUDENT_FILE})")
    return folders[-1]


def resolve_checkpoint(folder: Path) -> Path:
    """The checkpoint that `folder` is, or of a run the one in its file `best`, or its newest; a log line says which."""
    if (folder / STUDENT_FILE).is_file() or not (folder / BEST_FILE).is_file():
        return newest_checkpoint(folder)
    best = folder / str(json.loads((folder / BEST_FILE).read_bytes())["checkpoint"])
    if not (best / STUDENT_FILE).is_file():
        raise ValueError(f"checkpoint={folder}: its best, {best.name}, is gone; run evaluate --select again")
    logging.info("%s: using %s, the best by evaluate --select", folder, best.name)
    return best


def write_best(run: Path, name: str, *, distance: float, iteration: int) -> Path:
    """Say in the file `best` which step folder of a run is to be used."""
    facts = {"checkpoint": name, "distance": distance, "iteration": iteration}
    write_file(run / BEST_FILE, (json.dumps(facts, indent=1) + "\n").encode())
    return run / BEST_FILE


def read_facts(checkpoint: Path) -> StudentFacts:
    """What the student of a checkpoint is."""
    fields = json.loads((checkpoint / STUDENT_FILE).read_bytes())
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
    write_file(folder / INDEX_FILE, (json.dumps(facts, indent=1) + "\n").encode())


def checkpoint_damage(checkpoint: Path, *, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None where every byte is as it was written.

    Of several ranks each reads its share of the files.
    """
    try:
        expected = {
            name: FileFacts(**facts) for name, facts in json.loads((checkpoint / INDEX_FILE).read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{INDEX_FILE} cannot be read ({error})"
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = pool.map(
            lambda name: checkpoint_file_damage(checkpoint / name, expected[name]), sorted(expected)[rank::world]
        )
        return next((problem for problem in problems if problem is not None), None)


def checkpoint_file_damage(path: Path, expected: FileFacts) -> str | None:
    """What is wrong with a file of a checkpoint, in words; None where nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected.size:
        return f"{path.name} has {path.stat().st_size} bytes, {expected.size} were written"
    return None if file_facts(path) == expected else f"{path.name} has other bytes than were written"


def set_aside(run: Path, *, after: int) -> None:
    """Rename the checkpoints of later iterations, damaged as they are, and remove what was never finished."""
    for folder in run.glob("step-*"):
        if folder.suffix == ".partial":
            shutil.rmtree(folder)
        elif STEP_FOLDER_PATTERN.fullmatch(folder.name) and iteration_of(folder) > after:
            damaged_folder = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(damaged_folder, ignore_errors=True)
            folder.replace(damaged_folder)


def load_checkpoint(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint, each in its own dtype.

    Raises ValueError where it lacks one, or cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
        except CheckpointException as error:
            raise ValueError(f"{checkpoint}: does not give what is needed of it ({error_reason(error)})") from error


def stored_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors of a checkpoint."""
    entries = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: entry.properties.dtype for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def error_reason(error: BaseException) -> str:
    """The first cause in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def prune_checkpoints(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints, every `keep_every` iterations' (0: none), and the best."""
    best = json.loads((run / BEST_FILE).read_bytes())["checkpoint"] if (run / BEST_FILE).is_file() else None
    for old in list_checkpoints(run)[:-keep_last]:
        if old.name != best and not (keep_every and iteration_of(old) % keep_every == 0):
            doomed = old.with_name(old.name + ".partial")  # so that a kill leaves nothing that looks whole
            old.replace(doomed)
            shutil.rmtree(doomed)
