"""Exponential moving average of the student's float32 masters, shard by shard."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stage2_distill.carry import Host, carried
from stage2_distill.compact import local

Named = Iterable[tuple[str, Tensor]]


class Ema:
    """A running average; under FSDP each rank averages only the shards that it holds."""

    def __init__(self, masters: Named, *, offload: bool = False) -> None:
        host = Host(offload=offload)
        self._weights = {name: host.home(master.clone()) for name, master in masters}
        self.aside = torch.cuda.Stream() if offload and torch.cuda.is_available() else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages, as they are after the last update."""
        self.settle()
        if self.aside is not None:
            self.aside.synchronize()
        return self._weights

    def settle(self) -> None:
        """Let what follows on the device wait for an update that runs aside: call it before the masters change."""
        if self.aside is not None:
            torch.cuda.current_stream().wait_stream(self.aside)

    @torch.no_grad()
    def update(self, masters: Named, decay: float, device: torch.device) -> None:
        """average = decay * average + (1 - decay) * master; decay 0 copies.

        Averages in host memory are updated aside: their copies take longer than one forward pass, and nobody waits.
        """
        if self.aside is not None:
            self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            averages = carried(({"average": weight} for weight in self._weights.values()), device)
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
