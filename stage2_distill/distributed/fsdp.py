"""FSDP2: shards a network, reduces and clips its gradients."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stage2_distill.distributed.process_group import RankContext

Net = TypeVar("Net", bound=torch.nn.Module)


def apply_fsdp(net: Net, ranks: RankContext, dtype: torch.dtype, *, net_casts: bool = False) -> Net:
    """Apply FSDP2 to a skeleton, each block, then the root; the caller then gives this rank's part its memory.

    The network computes in `dtype`, gradients are reduced in float32. Inputs are not cast: the times must stay
    float32. One process needs no sharding where parameters have the dtype already, or the network `casts` the others.
    """
    if ranks.world > 1 or not (net_casts or all(parameter.dtype == dtype for parameter in net.parameters())):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in net.get_submodule("blocks").children():
            fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        # the root too goes back to shards after a forward: a rollout has no backward pass that would do it
        fully_shard(net, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    return net


def set_gradient_all_reduce(net: torch.nn.Module, last: bool) -> None:
    """Say whether the next backward pass is the last of an update.

    Each pass leaves a rank with its own part of the gradients only (20 GB whole, for 5 B parameters, would be too
    much to accumulate); the replicas of HSDP are averaged in the last pass alone.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(last)  # of all below too
            return


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients of all ranks to a global norm of at most `limit`; the norm before that, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
