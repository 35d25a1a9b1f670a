"""The process group: ranks, their device and their mesh."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.device import pick_device


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh


def start(device: str, *, replicate: int = 1) -> Ranks:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    ValueError where the ranks cannot hold `replicate` whole networks.
    """
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"  # checkpoints and signals go over gloo
        if "WORLD_SIZE" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=own_store(store), rank=rank, world_size=world)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, world, place, make_mesh(place.type, world, replicate))


def own_store(store: dist.Store) -> dist.Store:
    """A part of torchrun's store for this start of the ranks.

    torchrun keeps its store when it starts killed ranks again: they must not find the addresses of the dead. On several
    nodes it counts restarts a node, so the count cannot name the part there.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def make_mesh(kind: str, world: int, replicate: int) -> DeviceMesh:
    """All ranks in a row, or `replicate` rows that each hold a whole network (HSDP)."""
    if world % replicate:
        fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"replicate={replicate}: does not divide {world} ranks; possible are {fits}")
    if replicate == 1:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))


def of_all_ranks(figures: torch.Tensor) -> torch.Tensor:
    """The figures (F) of every rank, in order (ranks F)."""
    if dist.get_world_size() == 1:
        return figures[None]
    rows = [torch.empty_like(figures) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, figures)
    return torch.stack(rows)


def on_any_rank(here: bool) -> bool:
    """Whether something is so on any rank; over the CPU, for it is asked in every iteration and a GPU is busy."""
    if dist.get_world_size() == 1:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
