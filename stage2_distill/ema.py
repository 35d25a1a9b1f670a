"""Exponential moving average of the student's float32 masters, shard by shard."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stage2_distill.carry import carried, home_of
from stage2_distill.compact import local

Named = Iterable[tuple[str, Tensor]]


class Ema:
    """A running average; under FSDP each rank averages only the shards that it holds."""

    def __init__(self, masters: Named, *, offload: bool = False) -> None:
        self.weights = {name: home_of(master.clone(), offload=offload) for name, master in masters}

    @torch.no_grad()
    def update(self, masters: Named, decay: float, device: torch.device) -> None:
        """average = decay * average + (1 - decay) * master; decay 0 copies."""
        averages = carried(({"average": weight} for weight in self.weights.values()), device)
        for (_, master), here in zip(masters, averages, strict=True):
            here["average"].lerp_(master, 1 - decay)

    @contextmanager
    def in_place_of(self, net: nn.Module) -> Iterator[None]:
        """Let `net` compute with the average for a while; its own weights wait in host memory and come back."""
        with torch.no_grad():
            own = {name: local(weight).to("cpu", copy=True) for name, weight in net.named_parameters()}
            _fill(net, {name: local(average) for name, average in self.weights.items()})
        try:
            yield
        finally:
            _fill(net, own)


@torch.no_grad()
def _fill(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in net.named_parameters():
        local(weight).copy_(weights[name])
