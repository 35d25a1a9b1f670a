"""Ranks, devices and sharding: what differs between one process and many."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.device import pick_device
from stage2_distill.wan import Network, materialise


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


def shard(net: Network, ranks: Ranks, dtype: torch.dtype, *, casts: bool = False) -> Network:
    """Apply FSDP2 to a skeleton, each block, then the root, and give this rank's part its memory.

    The network computes in `dtype`, gradients are reduced in float32. Inputs are not cast: the times must stay
    float32. One process needs no sharding where parameters have the dtype already, or the network `casts` the others.
    """
    if ranks.world > 1 or not (casts or all(parameter.dtype == dtype for parameter in net.parameters())):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in net.blocks:
            fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        # the root too goes back to shards after a forward: a rollout has no backward pass that would do it
        fully_shard(net, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    return materialise(net, ranks.device)


def reduce_gradients(net: torch.nn.Module, last: bool) -> None:
    """Say whether the next backward pass is the last of an update.

    Each pass leaves a rank with its own part of the gradients only (20 GB whole, for 5 B parameters, would be too
    much to accumulate); the replicas of HSDP are averaged in the last pass alone.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(last)  # of all below too
            return


def clip_in_place(net: torch.nn.Module, limit: float) -> torch.Tensor:
    """Scale the gradients of all ranks to a global norm of at most `limit`; the norm before that, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
