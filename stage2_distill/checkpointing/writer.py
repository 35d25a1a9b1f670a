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
from dataclasses import asdict
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
    STUDENT,
    FileFacts,
    StudentFacts,
    file_facts,
    prune,
    reason,
    step_folder,
    write_index,
)
from stage2_distill.checkpointing.staging import Rooms, Snapshot, host_mesh, make_rooms
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.dtensor import local
from stage2_distill.distributed.process_group import Ranks
from stage2_distill.dmd.schedule import first_role

FILE_BYTES = 2**30  # a rank's file; while it is written it stands in memory once more
LONGEST = timedelta(hours=2)  # that ranks wait for the slowest one's files
FAILURES = (OSError, RuntimeError, SafetensorError, CheckpointException)


class SaveError(RuntimeError):
    """The last checkpoint of a run could not be written; the message says why and what is left."""


class Saver:
    """Writes the checkpoints of a run, one at a time; all ranks make the same calls."""

    def __init__(self, run: Path, config: DistillConfig, ranks: Ranks) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.group = dist.new_group(backend="gloo", timeout=LONGEST)  # its own: training talks at the same time
        self.host = host_mesh(ranks)
        self.thread: threading.Thread | None = None
        self.rooms: Rooms = {}
        self.making: Future[None] | None = None
        self.snapshot: Snapshot | None = None  # of the newest one
        self.failed: str | None = None  # why the newest one was not written

    def save(self, tensors: Mapping[str, Tensor], facts: StudentFacts) -> None:
        """Begin a checkpoint of live tensors; they may change once `copied` has returned."""
        self.wait()
        beside = self.config.checkpoint_beside
        if beside:
            self.make_rooms(tensors)
        first = first_role(facts.iteration, self.config)
        self.snapshot = Snapshot(tensors, self.host, self.rooms, first=first) if beside else None
        self.thread = threading.Thread(target=self._write, args=(dict(tensors), facts), name="checkpoint", daemon=True)
        self.thread.start()
        if not beside:
            self.wait()

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to make room for copies of such tensors, so that the first checkpoint need not wait for it."""
        pool = ThreadPoolExecutor(1)
        self.making = pool.submit(make_rooms, tensors, self.rooms)
        pool.shutdown(wait=False)

    def make_rooms(self, tensors: Mapping[str, Tensor]) -> None:
        """Wait until that has been done, or do it; SaveError where the host has no such room."""
        try:
            if self.making is not None:
                self.making.result()
            make_rooms(tensors, self.rooms)
        except (RuntimeError, MemoryError) as error:
            raise SaveError(
                f"no host memory for a checkpoint's copy ({reason(error)}); go on with --no-checkpoint-beside"
            ) from error

    def copied(self) -> None:
        """Wait until the tensors may change."""
        snapshot = self.snapshot
        if snapshot is not None:
            snapshot.result()

    def before_steps_of(self, optimizers: Mapping[str, torch.optim.Optimizer], clock: PhaseTimer) -> None:
        """Let each role's optimizer wait before a step for the copies of what it changes, and for no others."""
        for role, optimizer in optimizers.items():
            optimizer.register_step_pre_hook(partial(self._before_step, role, clock))

    def _before_step(self, role: str, clock: PhaseTimer, *_: object) -> None:
        snapshot = self.snapshot
        if snapshot is not None and snapshot.missing(role):
            with clock("checkpoint"):
                snapshot.hold(role)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the checkpoint that was begun has ended, well or not."""
        if self.thread is not None:
            self.thread.join(seconds)

    def finish(self) -> None:
        """Wait for the last checkpoint; SaveError where it could not be written."""
        self.wait()
        if self.failed is not None:
            raise SaveError(f"{self.failed}; make room and give the same command again")
        if self.ranks.rank == 0:  # an earlier run may have been killed after naming its last one and before this
            prune(self.run, self.config.keep, self.config.keep_every)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait(60 if error else None)  # another rank may be gone, and would be waited for in vain
        if error is None:
            dist.destroy_process_group(self.group)

    def _write(self, tensors: dict[str, Tensor], facts: StudentFacts) -> None:
        """All of one checkpoint, in its own thread."""
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)
        name = step_folder(self.run, facts.iteration).name
        self.failed = f"checkpoint {name} was not finished"  # whatever may happen below
        began = time.perf_counter()
        try:
            copies = tensors if self.snapshot is None else self.snapshot.result()
            write(self.run, copies, facts, self.group)
        except FAILURES as error:
            self.failed = f"checkpoint {name} could not be written ({reason(error)})"
            if self.ranks.rank == 0 or isinstance(error, OSError):
                logging.warning("%s; the older ones are kept and training goes on", self.failed)
            return
        finally:
            self.snapshot = None  # as large as all of the state
        self.failed = None
        if self.ranks.rank == 0:
            prune(self.run, self.config.keep, self.config.keep_every)
            logging.info("checkpoint %s, written in %.1f s", name, time.perf_counter() - began)


def write(run: Path, copies: dict[str, Tensor], facts: StudentFacts, group: dist.ProcessGroup) -> None:
    """Write, check and name a checkpoint; all ranks call it together, and all fail where one does."""
    folder = step_folder(run, facts.iteration)
    partial = folder.with_name(folder.name + ".partial")
    rank, world = dist.get_rank(), dist.get_world_size()
    first = rank == 0
    try:
        together(lambda: clear(partial) if first else None, group)
        dcp.save(copies, storage_writer=writer(partial, copies, world), process_group=group)
        together(lambda: check_files(partial, copies, rank), group)
        together(lambda: seal(partial, facts, world) if first else None, group)
        together(lambda: give_name(partial, folder) if first else None, group)
    except FAILURES:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def together(step: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Do a step on this rank; it raises on all ranks where it fails on one."""
    failure = None
    try:
        step()
    except FAILURES as error:
        failure = error
    failed = torch.tensor(int(failure is not None))
    dist.all_reduce(failed, group=group)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"{int(failed)} other ranks failed")


def clear(partial: Path) -> None:
    """Remove what a killed run left."""
    if partial.exists():
        shutil.rmtree(partial)


def writer(partial: Path, copies: dict[str, Tensor], world: int) -> HuggingFaceStorageWriter:
    """Each rank writes its own parts, in files of some FILE_BYTES."""
    files, total = {}, 0
    for name, value in copies.items():
        files[name] = 1 + total // (FILE_BYTES * world)
        total += value.numel() * value.element_size()
    return HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)


def check_files(partial: Path, copies: dict[str, Tensor], rank: int) -> None:
    """Read this rank's files back, compare them with what was meant, and write down what they are."""
    found = {}
    for path in sorted(partial.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not same_bytes(file.get_tensor(name), local(copies[name]).cpu()):
                    raise OSError(f"{path.name}: {name} is not what was written")
        found[path.name] = asdict(file_facts(path))
    (partial / f"rank-{rank:05d}.json").write_text(json.dumps(found))


def same_bytes(one: Tensor, two: Tensor) -> bool:
    """Equality that holds for NaN too."""
    flat = [value.contiguous().view(-1).view(torch.uint8) for value in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*flat)


def seal(partial: Path, facts: StudentFacts, world: int) -> None:
    """Say what the student is, and gather what all ranks know of their files into the index."""
    write_file(partial / STUDENT, (json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n").encode())
    found = {STUDENT: file_facts(partial / STUDENT)}
    for rank in range(world):
        note = partial / f"rank-{rank:05d}.json"
        found |= {name: FileFacts(**fields) for name, fields in json.loads(note.read_bytes()).items()}
        note.unlink()
    write_index(partial, found)
    sync_folder(partial)


def give_name(partial: Path, folder: Path) -> None:
    """The last act."""
    partial.replace(folder)
    sync_folder(folder.parent)
