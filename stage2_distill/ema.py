"""Exponential moving average of the student's weights, shard by shard."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """A running average; under FSDP each rank averages only the shards that it holds."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}

    def update(self, net: nn.Module, decay: float) -> None:
        """average = decay * average + (1 - decay) * weight; decay 0 copies."""
        current: Mapping[str, Tensor] = dict(net.named_parameters())
        with torch.no_grad():
            for name, average in self.weights.items():
                average.lerp_(current[name].detach(), 1 - decay)
