"""Exponential moving average of the student's float32 masters, shard by shard."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stage2_distill.carry import carried, home_of

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
