"""Ranks, devices and sharding: what differs between one process and many."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.device import pick_device
from stage2_distill.wan import Network


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int
    world: int
    device: torch.device


def start(device: str) -> Ranks:
    """Join the process group that torchrun describes; without torchrun, a group of one."""
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(f"cpu:gloo,cuda:{backend}" if place.type == "cuda" else backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), dist.get_world_size(), place)


def shard(net: Network, ranks: Ranks, dtype: torch.dtype) -> Network:
    """Move to the device and apply FSDP2: each block, then the root.

    The network computes in `dtype`, gradients are reduced in float32. Inputs are not cast: the times must stay
    float32. One process in float32 needs no sharding.
    """
    net.to(ranks.device)
    if ranks.world == 1 and dtype == torch.float32:
        return net
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the root too goes back to shards after a forward: a rollout has no backward pass that would do it
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return net


def reduce_gradients(net: torch.nn.Module, now: bool) -> None:
    """Say whether the next backward pass averages gradients over the ranks or only accumulates them."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(now)


def clip(net: torch.nn.Module, limit: float) -> torch.Tensor:
    """Scale the gradients of all ranks to a global norm of at most `limit`; the norm before that, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Average of a tensor over all ranks."""
    if dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value / dist.get_world_size()
