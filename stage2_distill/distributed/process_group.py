"""The process group: ranks, their device and their mesh."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.device import pick_device
from common.files import FolderLock
from stage2_distill.config import ranks_per_copy


@dataclass(frozen=True)
class RankContext:
    """This process among all processes of a run."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",) or, for HSDP, ("replicate", "shard")


def start_process_group(device: str, *, replicate: int = 1) -> RankContext:
    """Join the process group that torchrun describes, else one of its own; ValueError if `replicate` does not fit."""
    torch_device = pick_device(device)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if not dist.is_initialized():
        # checkpoints and stop signals use gloo beside NCCL
        backend = "cpu:gloo,cuda:nccl" if torch_device.type == "cuda" else "gloo"
        alone = (dist.HashStore(), 0, 1)  # without torchrun: a store within this process
        store, rank, world = next(dist.rendezvous("env://")) if "WORLD_SIZE" in os.environ else alone
        dist.init_process_group(backend, store=restart_store(store), rank=rank, world_size=world)
    rank, world = dist.get_rank(), dist.get_world_size()
    return RankContext(rank, world, torch_device, build_mesh(torch_device.type, world, replicate))


def restart_store(store: dist.Store) -> dist.Store:
    """A part of torchrun's store for this start of the ranks."""
    # torchrun keeps its store when it restarts killed ranks, and they must not find the addresses of dead processes. On
    # several nodes it counts restarts per node, so the count cannot name a common part, and the whole store is used.
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def build_mesh(device_type: str, world: int, replicate: int) -> DeviceMesh:
    """All ranks in one dimension, or `replicate` rows that each hold a complete network (HSDP)."""
    shards = ranks_per_copy(world, replicate)
    if replicate == 1:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shards), mesh_dim_names=("replicate", "shard"))


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder on all ranks: one that outlives the first still keeps other runs out.

    The folder has its lock file before any rank goes on. ValueError on the first rank if another run holds the lock.
    """
    rank, world = rank_and_world()
    if rank > 0:
        wait_for_ranks()
    with FolderLock(folder) as lock:
        if rank == 0:
            lock.hold()
        if world > 1:
            lock.share()
        if rank == 0:
            wait_for_ranks()
        yield


def join_ranks(device: str) -> tuple[int, int]:
    """Rank and number of the processes of torchrun, which can wait for each other from now on; (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start_process_group(device)
    return rank_and_world()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_ranks() -> None:
    """Return once all ranks have called this, at once without a process group; unlike `dist.barrier` without NCCL."""
    if dist.is_initialized():
        on_any_rank(False)


def gather_from_ranks(values: torch.Tensor) -> torch.Tensor:
    """The values (N) of all ranks, as rows in the order of ranks (ranks N)."""
    if dist.get_world_size() == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def on_any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank; all ranks call it together."""
    if dist.get_world_size() == 1:
        return value
    flag = torch.tensor(int(value))  # on the CPU: a GPU would first finish its queued work, in every iteration
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
