"""Writing checkpoints beside training: a copy in host memory, then files, which are checked before they get their name.

What a checkpoint is and how it is found and judged stands in `checkpoint.py`.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from common.files import (
    sync_folder,  # fmt: skip
    write_file,
)
from common.timer import PhaseTimer
from stage2_distill.checkpointing.format import (
    STUDENT_FILE,
    FileFacts,
    StudentFacts,
    error_reason,
    file_facts,
    prune_checkpoints,
    step_folder,
    write_index,
)
from stage2_distill.checkpointing.staging import HostBuffers, StagedState, allocate_host_buffers, build_cpu_mesh
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import STUDENT

FILE_BYTES = 2**30  # a rank's file; while it is written it stands in memory once more
WRITE_TIMEOUT = timedelta(hours=2)  # that ranks wait for the slowest one's files
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written; the message says why and what is left."""


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
        self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)  # its own: training talks at the same time
        self.cpu_mesh = build_cpu_mesh(ranks)
        self.thread: threading.Thread | None = None
        self.host_buffers: HostBuffers = {}
        self.buffer_task: Future[None] | None = None
        self.snapshot: StagedState | None = None  # of the newest one
        self.failure: str | None = None  # why the newest one was not written

    def save(self, tensors: Mapping[str, Tensor], facts: StudentFacts, *, first: str = STUDENT) -> None:
        """Begin a checkpoint of live tensors; they may change once `wait_for_copies` has returned.

        first: the role that is updated next, whose tensors are copied first.
        """
        self.wait()
        asynchronous = self.options.async_checkpoint
        if asynchronous:
            self.wait_for_buffers(tensors)
        self.snapshot = StagedState(tensors, self.cpu_mesh, self.host_buffers, first=first) if asynchronous else None
        self.thread = threading.Thread(
            target=self._write_checkpoint, args=(dict(tensors), facts), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not asynchronous:
            self.wait()

    def prepare_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to make room for copies of such tensors, so that the first checkpoint need not wait for it."""
        pool = ThreadPoolExecutor(1)
        self.buffer_task = pool.submit(allocate_host_buffers, tensors, self.host_buffers)
        pool.shutdown(wait=False)

    def wait_for_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Wait until that has been done, or do it; SaveError where the host has no such room."""
        try:
            if self.buffer_task is not None:
                self.buffer_task.result()
            allocate_host_buffers(tensors, self.host_buffers)
        except (RuntimeError, MemoryError) as error:
            raise SaveError(
                f"no host memory for a checkpoint's copy ({error_reason(error)}); go on with --no-checkpoint-beside"
            ) from error

    def wait_for_copies(self) -> None:
        """Wait until the tensors may change."""
        snapshot = self.snapshot
        if snapshot is not None:
            snapshot.wait_for_all()

    def register_step_hooks(self, optimizers: Mapping[str, torch.optim.Optimizer], clock: PhaseTimer) -> None:
        """Let each role's optimizer wait before a step for the copies of what it changes, and for no others."""
        for role, optimizer in optimizers.items():
            optimizer.register_step_pre_hook(partial(self._before_step, role, clock))

    def _before_step(self, role: str, clock: PhaseTimer, *_: object) -> None:
        snapshot = self.snapshot
        if snapshot is not None and snapshot.is_pending(role):
            with clock("checkpoint"):
                snapshot.wait_for_role(role)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the checkpoint that was begun has ended, well or not."""
        if self.thread is not None:
            self.thread.join(seconds)

    def finish(self) -> None:
        """Wait for the last checkpoint; SaveError where it could not be written."""
        self.wait()
        if self.failure is not None:
            raise SaveError(f"{self.failure}; make room and give the same command again")
        if self.ranks.rank == 0:  # an earlier run may have been killed after naming its last one and before this
            prune_checkpoints(self.run_folder, self.options.keep_last, self.options.keep_every)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait(60 if error else None)  # another rank may be gone, and would be waited for in vain
        if error is None:
            dist.destroy_process_group(self.group)

    def _write_checkpoint(self, tensors: dict[str, Tensor], facts: StudentFacts) -> None:
        """All of one checkpoint, in its own thread."""
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)
        name = step_folder(self.run_folder, facts.iteration).name
        self.failure = f"checkpoint {name} was not finished"  # whatever may happen below
        start_time = time.perf_counter()
        try:
            copies = tensors if self.snapshot is None else self.snapshot.wait_for_all()
            write_checkpoint(self.run_folder, copies, facts, self.group)
        except WRITE_ERRORS as error:
            self.failure = f"checkpoint {name} could not be written ({error_reason(error)})"
            if self.ranks.rank == 0 or isinstance(error, OSError):
                logging.warning("%s; the older ones are kept and training goes on", self.failure)
            return
        finally:
            self.snapshot = None  # as large as all of the state
        self.failure = None
        if self.ranks.rank == 0:
            prune_checkpoints(self.run_folder, self.options.keep_last, self.options.keep_every)
            logging.info("checkpoint %s, written in %.1f s", name, time.perf_counter() - start_time)


def write_checkpoint(run: Path, copies: dict[str, Tensor], facts: StudentFacts, group: dist.ProcessGroup) -> None:
    """Write, check and name a checkpoint; all ranks call it together, and all fail where one does."""
    folder = step_folder(run, facts.iteration)
    partial_folder = folder.with_name(folder.name + ".partial")
    rank, world = dist.get_rank(), dist.get_world_size()
    first = rank == 0
    try:
        raise_on_all_ranks(lambda: remove_partial(partial_folder) if first else None, group)
        dcp.save(copies, storage_writer=storage_writer(partial_folder, copies, world), process_group=group)
        raise_on_all_ranks(lambda: check_files(partial_folder, copies, rank), group)
        raise_on_all_ranks(lambda: finalize_metadata(partial_folder, facts, world) if first else None, group)
        raise_on_all_ranks(lambda: publish_checkpoint(partial_folder, folder) if first else None, group)
    except WRITE_ERRORS:
        if first:
            shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def raise_on_all_ranks(action: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Do a step on this rank; it raises on all ranks where it fails on one."""
    failure = None
    try:
        action()
    except WRITE_ERRORS as error:
        failure = error
    failed = torch.tensor(int(failure is not None))
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"{int(failed)} other ranks failed")


def remove_partial(partial_folder: Path) -> None:
    """Remove what a killed run left."""
    if partial_folder.exists():
        shutil.rmtree(partial_folder)


def storage_writer(partial_folder: Path, copies: dict[str, Tensor], world: int) -> HuggingFaceStorageWriter:
    """Each rank writes its own parts, in files of some FILE_BYTES."""
    files, total = {}, 0
    for name, value in copies.items():
        files[name] = 1 + total // (FILE_BYTES * world)
        total += value.numel() * value.element_size()
    return HuggingFaceStorageWriter(str(partial_folder), fqn_to_index_mapping=files, save_distributed=True)


def check_files(partial_folder: Path, copies: dict[str, Tensor], rank: int) -> None:
    """Read this rank's files back, compare them with what was meant, and write down what they are."""
    files = {}
    for path in sorted(partial_folder.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not same_bytes(file.get_tensor(name), local_tensor(copies[name]).cpu()):
                    raise OSError(f"{path.name}: {name} is not what was written")
        files[path.name] = asdict(file_facts(path))
    (partial_folder / f"rank-{rank:05d}.json").write_text(json.dumps(files))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Equality that holds for NaN too."""
    flat = [value.contiguous().view(-1).view(torch.uint8) for value in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


def finalize_metadata(partial_folder: Path, facts: StudentFacts, world: int) -> None:
    """Say what the student is, and gather what all ranks know of their files into the index."""
    write_file(partial_folder / STUDENT_FILE, (json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n").encode())
    files = {STUDENT_FILE: file_facts(partial_folder / STUDENT_FILE)}
    for rank in range(world):
        rank_index = partial_folder / f"rank-{rank:05d}.json"
        files |= {name: FileFacts(**fields) for name, fields in json.loads(rank_index.read_bytes()).items()}
        rank_index.unlink()
    write_index(partial_folder, files)
    sync_folder(partial_folder)


def publish_checkpoint(partial_folder: Path, folder: Path) -> None:
    """The last act."""
    partial_folder.replace(folder)
    sync_folder(folder.parent)
