"""Two ranks update a sharded layer with 8-bit moments and write what one process would have: `compact_ranks.py OUT`.

They go on from the state that one process has after three steps, each with its rows of it.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stage2_distill.distributed.dtensor import local_tensor, sharded_like
from stage2_distill.distributed.process_group import RankContext, build_mesh, start_process_group
from stage2_distill.offload import pinned_memory
from stage2_distill.optim.compact_adamw import CompactAdamW
from stage2_distill.optim.ema import EmaWeights

SETTINGS = {"lr": 1e-2, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
SHAPES = ((13, 128), (13,))


def layer() -> nn.Linear:
    """The layer that all begin with."""
    net = nn.Linear(128, 13)
    for parameter in net.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return net.bfloat16()


def part_of(whole: Tensor, target: Tensor) -> Tensor:
    """This rank's rows of a tensor, if the target is sharded."""
    if not isinstance(target, DTensor):
        return whole
    mesh = target.device_mesh
    return whole.chunk(mesh.size(mesh.ndim - 1))[mesh.get_local_rank(mesh.ndim - 1)]


def steps(net: nn.Module, optimizer: CompactAdamW, numbers: range) -> None:
    """Some updates with gradients that depend on the step alone."""
    for number in numbers:
        draws = torch.Generator().manual_seed(number)
        for parameter, shape in zip(net.parameters(), SHAPES, strict=True):
            grad = part_of(torch.randn(shape, generator=draws).bfloat16(), parameter)
            parameter.grad = sharded_like(parameter, grad)
        optimizer.clip_gradients(1e6)
        optimizer.step()


def kept(optimizer: CompactAdamW) -> list[Tensor]:
    """Masters and states."""
    return [
        *dict(optimizer.master_weights()).values(),
        *optimizer.state_tensors().values(),
    ]


def away(host: pinned_memory.PinnedPool, value: Tensor) -> Tensor:
    """`PinnedPool.place_tensor` as it is for a GPU's tensors."""
    return host.copy_into_slab(local_tensor(value)) if host.offload else value


def check_whole_copies(ranks: RankContext) -> None:
    """State that waits in host memory gives the same, where each rank holds a whole copy (HSDP)."""
    pinned_memory.PinnedPool.place_tensor, pinned_memory.allocate_pinned = (
        away,
        lambda size: torch.empty(size, dtype=torch.uint8),
    )
    optimizers = []
    for offload in (False, True):
        net = layer()
        fully_shard(net, mesh=build_mesh("cpu", ranks.world, ranks.world))
        optimizers.append(CompactAdamW(net, SETTINGS, offload=offload))
        average = EmaWeights(optimizers[-1].master_weights, ranks.device, offload=offload)
        with average.update_after(0.5):
            steps(net, optimizers[-1], range(5))
        optimizers[-1].averages = average.weights
    here, home = optimizers
    assert not any(isinstance(value, DTensor) for value in home.state_tensors().values())
    pairs = [*zip(kept(here), kept(home), strict=True), *((here.averages[n], home.averages[n]) for n in here.averages)]
    assert all(torch.equal(local_tensor(one), local_tensor(two)) for one, two in pairs)


if __name__ == "__main__":
    ranks = start_process_group("cpu")
    alone, sharded = layer(), layer()
    mine = CompactAdamW(alone, SETTINGS)
    steps(alone, mine, range(3))
    fully_shard(sharded, mesh=ranks.mesh)
    together = CompactAdamW(sharded, SETTINGS)
    for p, q in zip(alone.parameters(), sharded.parameters(), strict=True):
        pairs = [(p.data, q.data), *((mine.state[p][name], together.state[q][name]) for name in mine.state[p])]
        for source, target in pairs:
            local_tensor(target).copy_(part_of(source, target))
    steps(alone, mine, range(3, 8))
    steps(sharded, together, range(3, 8))
    for one, two in zip(kept(mine), kept(together), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(part_of(one, two), local_tensor(two)), (one.dtype, one.shape)
    assert any(value.dtype == torch.uint8 for value in kept(together))
    check_whole_copies(ranks)
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, and would abort the process
