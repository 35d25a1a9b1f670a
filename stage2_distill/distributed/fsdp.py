"""FSDP2: shards a network, reduces and clips its gradients."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stage2_distill.distributed.process_group import RankContext

Net = TypeVar("Net", bound=torch.nn.Module)


def apply_fsdp(net: Net, ranks: RankContext, dtype: torch.dtype, *, net_casts: bool = False) -> Net:
    """Apply FSDP2 to a network on the meta device: each block, then the root. The caller allocates this rank's part."""
    # A single process does not shard if all parameters have `dtype` or if the network casts the others (`net_casts`).
    if ranks.world > 1 or not (net_casts or all(parameter.dtype == dtype for parameter in net.parameters())):
        # inputs are not cast: bfloat16 would round the times
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in net.get_submodule("blocks").children():
            fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
        # FSDP keeps the root gathered until its backward pass, and a rollout has none
        fully_shard(net, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    return net


def set_gradient_all_reduce(net: torch.nn.Module, last: bool) -> None:
    """Average gradients over the replicas of HSDP in the next backward pass only if it is the `last` of an update."""
    # Every pass still scatters them over the shards: unsharded gradients of 5 B parameters would take 20 GB per rank.
    root = next((module for module in net.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.set_requires_all_reduce(last)  # of its submodules too


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients of all ranks to a global norm of at most `limit`; returns the norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
