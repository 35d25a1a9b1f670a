"""The checkpoint format: a folder `step-000500` of safetensors shards that is either complete or absent.

torch's distributed checkpoint writes the tensors in its safetensors form, so any number of ranks can read what any
other number wrote, and nothing is pickled. `student.json` holds the facts about the student, `index.json` the size and
hash of every file. `writer.py` gives the folder its name last.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.files import Count, read_json, write_file
from common.flow import timestep_sigmas
from common.video import FrameSize, VideoSpec

STUDENT_FILE, INDEX_FILE, BEST_FILE = "student.json", "index.json", "best"
PARTIAL_SUFFIX, DAMAGED_SUFFIX = ".partial", ".damaged"  # of folders that are not checkpoints, or no longer
FILE_PATTERN = re.compile(r"[\w-]+\.(safetensors|json)")  # names of the files of a checkpoint
STEP_FOLDER_PATTERN = re.compile(r"step-(\d{6,})")  # six digits or more: names sort up to a million iterations
HASH_THREADS = 4
READ_OPTIONS = {  # what readers of a checkpoint use of its options
    "iterations": int,
    "guidance_scale": int | float,
    "lora_rank": int,
    "lora_alpha": int | float | None,
    "shards": list | tuple,
}
# What torch's reader raises for safetensors files that are damaged, or that torch did not write.
READ_ERRORS = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
SAMPLER_KIND = "renoise"  # x0, then fresh noise at the next sigma


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file of a checkpoint, as `index.json` stores them."""

    size: Count  # bytes
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "FileFacts":
        """Size and hash of the file on disk."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class StudentFacts:
    """What a sampler must know about a checkpoint; the field names are the keys of `student.json`."""

    iteration: Count  # iterations completed
    ladder: tuple[float, ...]  # timesteps before the shift; the key keeps its old name, as old checkpoints have it
    shift: float
    sampler: str
    spec: VideoSpec  # of the longest videos; of several sizes that of the options
    base_model: str
    transformer: str  # fingerprint of the base model's transformer
    vae: str  # fingerprint of the VAE that encoded the latents
    text_encoder: str  # fingerprint
    config: dict[str, object]
    position: Count = 0  # records read from the stream
    memory: str = ""  # optimizer form of the roles; the first checkpoints lack it
    data_sets: tuple[str, ...] = ()  # `Manifest.content_digest` of each; checkpoints of 0.1 lack it
    base_loras: tuple[str, ...] = ()  # `digest_lora` of each file of --base-lora; earlier checkpoints lack it
    sizes: tuple[FrameSize, ...] = ()  # that it was trained on, if they are several; otherwise the file lacks the key
    lengths: tuple[int, ...] = ()  # likewise the numbers of frames

    def __post_init__(self) -> None:
        if not 1 <= self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: must be at least 1")
        if not self.ladder or sorted({0.0, *self.ladder}, reverse=True) != [*self.ladder, 0]:
            raise ValueError(f"ladder={list(self.ladder)}: must be falling numbers above 0")
        for name in READ_OPTIONS.keys() & self.config.keys():  # one that is missing has its default
            value, kind = self.config[name], READ_OPTIONS[name]
            if not isinstance(value, kind) or (isinstance(value, int | float) and not 0 <= value < math.inf):
                raise ValueError(f"{name}={value!r}: is not a value of that option")

    @property
    def stored_fields(self) -> dict[str, object]:
        """The fields as `student.json` holds them."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("sizes", "lengths")}

    @property
    def frame_sizes(self) -> tuple[FrameSize, ...]:
        """All sizes that the student was trained on."""
        return self.sizes or (self.spec.frame_size,)

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """All numbers of frames that it was trained on."""
        return self.lengths or (self.spec.num_frames,)

    @property
    def video_text(self) -> str:
        """The videos that it makes in words, such as `81 or 121 frames of 704x1280, 1280x704 (height x width)`."""
        counts, sizes = " or ".join(map(str, self.frame_counts)), ", ".join(map(str, self.frame_sizes))
        return f"{counts} frames of {sizes} (height x width)"

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the timesteps after the shift."""
        return timestep_sigmas(self.ladder, s=self.shift)


@dataclass(frozen=True)
class BestCheckpoint:
    """The file `best` of a run."""

    checkpoint: str  # name of the step folder
    distance: float
    iteration: Count

    def __post_init__(self) -> None:
        if not STEP_FOLDER_PATTERN.fullmatch(self.checkpoint):
            raise ValueError(f"checkpoint={self.checkpoint}: is not the name of a step folder")


def step_folder(run: Path, iteration: int) -> Path:
    """Folder of the checkpoint after `iteration` iterations."""
    return run / f"step-{iteration:06d}"


def iteration_of(folder: Path) -> int:
    """The number in a step folder's name."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; each was complete when it got its name."""
    folders = (path for path in run.glob("step-*") if STEP_FOLDER_PATTERN.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=iteration_of)


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the newest checkpoint of the run; ValueError if there is none."""
    folders = list_checkpoints(folder)
    if (folder / STUDENT_FILE).is_file() or (STEP_FOLDER_PATTERN.fullmatch(folder.name) and not folders):
        return folder
    if not folders:
        raise ValueError(f"checkpoint={folder}: holds no checkpoint (step-*/{STUDENT_FILE}); name a run of distill")
    return folders[-1]


def resolve_checkpoint(folder: Path, *, option: str = "checkpoint") -> Path:
    """`folder` itself if it is a checkpoint, else the run's best (file `best`, logged), else its newest checkpoint."""
    best_name = read_best(folder)  # None for a checkpoint, which holds no such file
    if best_name is None:
        return newest_checkpoint(folder)
    if not (folder / best_name / STUDENT_FILE).is_file():
        raise ValueError(f"{option}={folder}: its best, {best_name}, is gone; run evaluate --select again")
    logging.info("%s: using %s, the best by evaluate --select", folder, best_name)
    return folder / best_name


def read_best(run: Path) -> str | None:
    """Name of the step folder that the file `best` of a run selects; None without such a file."""
    path = run / BEST_FILE
    return read_json(path, BestCheckpoint).checkpoint if path.is_file() else None


def write_best(run: Path, name: str, *, distance: float, iteration: int) -> Path:
    """Select the step folder `name` of a run as its best; returns the path of the file `best`."""
    write_json(run / BEST_FILE, vars(BestCheckpoint(name, distance, iteration)))
    return run / BEST_FILE


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file completely or not at all."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_facts(checkpoint: Path) -> StudentFacts:
    """The facts about the student of a checkpoint; ValueError if they are missing or damaged."""
    return read_json(checkpoint / STUDENT_FILE, StudentFacts)


def read_index(checkpoint: Path) -> dict[str, FileFacts]:
    """The content of `index.json`; ValueError if it is damaged or not that of this checkpoint."""
    index = read_json(checkpoint / INDEX_FILE, dict[str, FileFacts])
    if STUDENT_FILE not in index:
        raise ValueError(f"{checkpoint / INDEX_FILE}: does not list {STUDENT_FILE}")
    for name in index:
        if not FILE_PATTERN.fullmatch(name):
            raise ValueError(f"{checkpoint / INDEX_FILE}: lists {name[:80]!r}, which is no file of a checkpoint")
    return index


def checkpoint_damage(checkpoint: Path, *, rank: int = 0, world: int = 1, prefix: str = "") -> str | None:
    """The first problem of a checkpoint as text, None if it is intact; each of `world` ranks reads a share of it.

    prefix: look only at the files that hold tensors whose names begin with it.
    """
    try:
        index = read_index(checkpoint)
    except ValueError as error:
        return str(error)
    paths = {checkpoint / name: facts for name, facts in sorted(index.items())}
    expected = [(path, facts) for path, facts in paths.items() if holds_tensors(path, prefix)]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = pool.map(lambda entry: file_damage(*entry), expected[rank::world])
        problem = next((problem for problem in problems if problem is not None), None)
    if problem is None and STEP_FOLDER_PATTERN.fullmatch(checkpoint.name):
        with suppress(ValueError):  # another version's, which the reader of the facts names
            iteration = read_facts(checkpoint).iteration
            if iteration != iteration_of(checkpoint):
                return f"{STUDENT_FILE} is that of iteration {iteration}"
    return problem


def holds_tensors(path: Path, prefix: str) -> bool:
    """Whether a file may hold tensors whose names begin with `prefix`."""
    if not prefix or path.suffix != ".safetensors" or not path.is_file():  # a pipe would be waited for
        return True
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.startswith(prefix) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # then its damage is what there is to say
        return True


def file_damage(path: Path, expected: FileFacts) -> str | None:
    """The problem of one file of a checkpoint as text, None if it is intact."""
    if not path.exists():
        return f"{path.name} is missing"
    if not path.is_file():  # a pipe would be waited for
        return f"{path.name} is no file"
    try:
        if path.stat().st_size != expected.size:  # before hashing: a truncated file need not be read
            return f"{path.name} has {path.stat().st_size} bytes, {expected.size} were written"
        return None if FileFacts.read(path) == expected else f"{path.name} has other bytes than were written"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def refuse_damaged(checkpoint: Path, weights: str) -> None:
    """Raise ValueError if files that hold the tensors `weights`.* are not what was written.

    Without an index, as in a copy of the weights alone, a warning says that nothing is checked.
    """
    if not (checkpoint / INDEX_FILE).exists():
        logging.warning("%s: is missing; the files are read unchecked", checkpoint / INDEX_FILE)
    elif (problem := checkpoint_damage(checkpoint, prefix=f"{weights}.")) is not None:
        others = [path.name for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
        remedy = f"name another one, such as {checkpoint.parent / others[-1]}" if others else "restore it from a copy"
        raise ValueError(f"checkpoint={checkpoint}: is damaged: {problem}; {remedy}")


def load_checkpoint(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint, each in its own dtype; ValueError if one is missing or unreadable."""
    check_headers(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint.absolute())))
        except CheckpointException as error:
            raise ValueError(f"{checkpoint}: does not have the required tensors ({error_reason(error)})") from error


def check_headers(checkpoint: Path) -> None:
    """Raise ValueError for the first file of tensors whose header cannot be read; torch would log a traceback."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            if path.is_file():  # a pipe would be waited for
                with safe_open(path, framework="pt"):
                    continue
            raise OSError("it is no file")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error


def stored_shapes(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names of the tensors of a checkpoint with the shape of all ranks' parts, and the dtype; ValueError if damaged."""
    check_headers(checkpoint)
    try:
        entries = HuggingFaceStorageReader(str(checkpoint.absolute())).read_metadata().state_dict_metadata
    except READ_ERRORS as error:
        raise ValueError(f"{checkpoint}: cannot be read ({error_reason(error)})") from error
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in tensors.items()}


def stored_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors of a checkpoint."""
    return {name: dtype for name, (_, dtype) in stored_shapes(checkpoint).items()}


def error_reason(error: BaseException) -> str:
    """The cause of an error in one line; of a CheckpointException, the cause on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


def rename_with_suffix(folder: Path, suffix: str) -> Path:
    """Append `suffix` to a folder's name, replacing an earlier folder of that name; returns the new path."""
    renamed = folder.with_name(folder.name + suffix)
    shutil.rmtree(renamed, ignore_errors=True)  # rename() replaces only an empty folder
    return folder.replace(renamed)


def delete_unfinished(run: Path) -> None:
    """Delete the checkpoints that a killed run left unfinished or half deleted."""
    for folder in run.glob(f"step-*{PARTIAL_SUFFIX}"):
        shutil.rmtree(folder)


def set_aside(run: Path, *, after: int) -> None:
    """Rename the checkpoints after iteration `after`, which are damaged."""
    for folder in list_checkpoints(run):
        if iteration_of(folder) > after:
            rename_with_suffix(folder, DAMAGED_SUFFIX)


def prune_checkpoints(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, each `keep_every`-th iteration's (0: none) and the best."""
    try:
        best_name = read_best(run)
    except ValueError as error:  # the best is not known, and must not be deleted
        logging.warning("%s; older checkpoints are kept until it is deleted or written again", error)
        return
    for folder in list_checkpoints(run)[:-keep_last]:
        if folder.name != best_name and not (keep_every and iteration_of(folder) % keep_every == 0):
            # a run killed during rmtree must not leave a folder that looks like a checkpoint
            shutil.rmtree(rename_with_suffix(folder, PARTIAL_SUFFIX))
