"""Writes checkpoints while training continues. Each save is one CheckpointJob with three stages:

    stage    training's thread starts copies of the state to host memory; an optimizer step waits for its role's copies
    write    the job's thread writes this rank's files, reads them back, compares and hashes them
    commit   the job's thread on rank 0 adds the metadata and gives the folder its name

Older checkpoints are pruned after the commit, so a save that fails deletes nothing. `format.py` has the format.
"""

import logging
import shutil
import threading
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from common.files import sync_folder
from common.timer import PhaseTimer
from stage2_distill.checkpointing import format as layout
from stage2_distill.checkpointing.staging import HostBuffers, StagedState, allocate_host_buffers, build_cpu_mesh
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import STUDENT

FILE_BYTES = 2**30  # per file; safetensors holds a file in memory once more while it is written
WRITE_TIMEOUT = timedelta(hours=2)  # ranks wait this long for the slowest rank's files
ERROR_EXIT_SECONDS = 60.0  # after an error another rank may be dead, and the job would wait for it in vain
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
FileIndex = dict[str, layout.FileFacts]  # by file name


class SaveError(RuntimeError):
    """A checkpoint could not be saved; the message has the reason and the remedy."""


@dataclass
class CheckpointJob:
    """One save: `write` and `commit` are called by all ranks together, and fail on all if they fail on one."""

    folder: Path
    facts: layout.StudentFacts
    ranks: RankContext
    group: dist.ProcessGroup
    failure: str | None = "the last checkpoint was not finished"  # None once the folder has its name

    @property
    def partial_folder(self) -> Path:
        """The folder before it has its name."""
        return self.folder.with_name(self.folder.name + layout.PARTIAL_SUFFIX)

    def write(self, tensors: dict[str, Tensor]) -> FileIndex:
        """Write this rank's files, read them back and hash them; returns the index of the files of all ranks."""
        with fail_on_all_ranks(self.group):
            if self.ranks.rank == 0 and self.partial_folder.exists():  # left by a killed run
                shutil.rmtree(self.partial_folder)
        storage_writer = build_storage_writer(self.partial_folder, tensors, self.ranks.world)
        dcp.save(tensors, storage_writer=storage_writer, process_group=self.group)
        with fail_on_all_ranks(self.group):
            own_index = verify_files(self.partial_folder, tensors, self.ranks.rank)
        indices: list[FileIndex] = [{} for _ in range(self.ranks.world)]
        dist.all_gather_object(indices, own_index, group=self.group)
        return dict(ChainMap(*indices))

    def commit(self, index: FileIndex) -> None:
        """Write the metadata and give the folder its name, on rank 0."""
        with fail_on_all_ranks(self.group):
            if self.ranks.rank == 0:
                student_file = self.partial_folder / layout.STUDENT_FILE
                layout.write_json(student_file, self.facts.stored_fields)
                index |= {student_file.name: layout.FileFacts.read(student_file)}
                fields = {name: asdict(index[name]) for name in sorted(index)}
                layout.write_json(self.partial_folder / layout.INDEX_FILE, fields)
                sync_folder(self.partial_folder)  # the files must be on the disk before the folder has its name
                self.partial_folder.replace(self.folder)
                sync_folder(self.folder.parent)


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of training that concern its checkpoints."""

    async_checkpoint: bool
    keep_last: int
    keep_every: int


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; all ranks make the same calls."""

    def __init__(self, run: Path, options: CheckpointOptions, ranks: RankContext) -> None:
        self.run_folder, self.options, self.ranks = run, options, ranks
        # a group of its own, because training communicates at the same time
        self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self.cpu_mesh = build_cpu_mesh(ranks)
        self.allocator = ThreadPoolExecutor(1)  # one thread, so that allocations follow each other
        self.host_buffers: HostBuffers = {}
        self.job: CheckpointJob | None = None  # of the last save, like its thread
        self.thread: threading.Thread | None = None
        self.staged: StagedState | None = None  # until the thread ends

    def prepare_buffers(self, tensors: Mapping[str, Tensor]) -> Future[None]:
        """Start allocating host memory for copies of `tensors`, so that the first `save` need not wait for it."""
        return self.allocator.submit(allocate_host_buffers, tensors, self.host_buffers)

    def save(self, tensors: Mapping[str, Tensor], facts: layout.StudentFacts, *, first: str = STUDENT) -> None:
        """Start a checkpoint of live tensors, after the one before; SaveError if the host has no memory for copies.

        The tensors may change after `wait_for_copies`; `register_step_hooks` makes optimizers wait for their own. With
        --no-async-checkpoint, return when the checkpoint has ended. first: the role that is updated next.
        """
        self.wait()
        self.staged = self._stage(tensors, first) if self.options.async_checkpoint else None
        self.job = CheckpointJob(layout.step_folder(self.run_folder, facts.iteration), facts, self.ranks, self.group)
        # a daemon: a job that waits for a dead rank must not keep the process alive
        self.thread = threading.Thread(target=self._run, args=(self.job, dict(tensors)), name="checkpoint", daemon=True)
        self.thread.start()
        if self.staged is None:  # --no-async-checkpoint: return when the checkpoint has ended
            self.wait()

    def _stage(self, tensors: Mapping[str, Tensor], first: str) -> StagedState:
        try:
            self.prepare_buffers(tensors).result()
        except (RuntimeError, MemoryError) as error:
            raise SaveError(
                f"async_checkpoint=True: no host memory for a copy of the state ({layout.error_reason(error)}); "
                "repeat the command with --no-async-checkpoint"
            ) from error
        return StagedState(tensors, self.cpu_mesh, self.host_buffers, first=first)

    def _run(self, job: CheckpointJob, tensors: dict[str, Tensor]) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)  # a new thread starts on GPU 0
        start_time = time.perf_counter()
        try:
            job.commit(job.write(tensors if self.staged is None else self.staged.wait_for_all()))
        except WRITE_ERRORS as error:
            job.failure = f"checkpoint {job.folder.name} could not be written ({layout.error_reason(error)})"
            if self.ranks.rank == 0:
                shutil.rmtree(job.partial_folder, ignore_errors=True)
            if self.ranks.rank == 0 or isinstance(error, OSError):
                logging.warning("%s; older checkpoints are kept and training continues", job.failure)
            return
        finally:
            self.staged = None  # it refers to the whole state, which may be replaced
        job.failure = None
        if self.ranks.rank == 0:
            layout.prune_checkpoints(self.run_folder, self.options.keep_last, self.options.keep_every)
            logging.info("checkpoint %s, written in %.1f s", job.folder.name, time.perf_counter() - start_time)

    def register_step_hooks(self, optimizers: Mapping[str, torch.optim.Optimizer], clock: PhaseTimer) -> None:
        """Make each role's optimizer wait, before a step, for the copies of what the step changes and for no others."""
        for role, optimizer in optimizers.items():
            optimizer.register_step_pre_hook(partial(self._before_step, role, clock))

    def _before_step(self, role: str, clock: PhaseTimer, *_: object) -> None:
        staged = self.staged  # read once: the job's thread resets it
        if staged is not None and staged.is_pending(role):
            with clock("checkpoint"):
                staged.wait_for_role(role)

    def wait_for_copies(self) -> None:
        """Wait until all tensors of the last save may change."""
        if (staged := self.staged) is not None:
            staged.wait_for_all()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint has ended, successfully or not, or for `seconds`."""
        if self.thread is not None:
            self.thread.join(seconds)

    def finish(self) -> None:
        """Wait for the last checkpoint; SaveError if it could not be written."""
        self.wait()
        if self.job is not None and self.job.failure is not None:
            raise SaveError(f"{self.job.failure}; free disk space and repeat the same command")
        if self.ranks.rank == 0:  # an earlier run may have been killed between its last commit and the pruning
            layout.prune_checkpoints(self.run_folder, self.options.keep_last, self.options.keep_every)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.wait(None if error_type is None else ERROR_EXIT_SECONDS)
        self.allocator.shutdown(wait=False)
        if error_type is None:  # destroying the group waits for all ranks
            dist.destroy_process_group(self.group)


@contextmanager
def fail_on_all_ranks(group: dist.ProcessGroup) -> Iterator[None]:
    """Run the body on every rank; if it fails on one, raise on all, so that none waits for another in vain."""
    failure = None
    try:
        yield
    except WRITE_ERRORS as error:
        failure = error
    failed = torch.tensor(int(failure is not None))
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"{int(failed)} other ranks failed")


def build_storage_writer(folder: Path, tensors: Mapping[str, Tensor], world: int) -> HuggingFaceStorageWriter:
    """A writer with which each of `world` ranks writes its own parts, in files of about FILE_BYTES."""
    file_numbers, total = {}, 0
    for name, value in tensors.items():
        file_numbers[name] = 1 + total // (FILE_BYTES * world)  # a tensor's bytes are spread over all ranks
        total += value.numel() * value.element_size()
    # absolute: fsspec takes data:NAME for an address
    return HuggingFaceStorageWriter(str(folder.absolute()), fqn_to_index_mapping=file_numbers, save_distributed=True)


def verify_files(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> FileIndex:
    """Read a rank's files back; returns what they are by name, OSError if one differs from `tensors`."""
    index = {}
    for path in sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not same_bytes(file.get_tensor(name), local_tensor(tensors[name]).cpu()):
                    raise OSError(f"{path.name}: {name} is not what was written")
        index[path.name] = layout.FileFacts.read(path)
    return index


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equality of dtype, shape and bytes; unlike `torch.equal` it holds for NaN too."""
    flat = [value.contiguous().view(-1).view(torch.uint8) for value in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)
