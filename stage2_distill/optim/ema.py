"""Exponential moving average of the student's float32 masters, shard by shard."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.offload.pinned_memory import PinnedPool
from stage2_distill.offload.prefetch import prefetched_groups

NamedTensors = Iterable[tuple[str, Tensor]]


class EmaWeights:
    """A running average; under FSDP each rank averages only the shards that it holds.

    One in host memory takes none before it is asked for or is more than a plain copy of the masters, which `masters()`
    yields.
    """

    def __init__(self, masters: Callable[[], NamedTensors], *, offload: bool = False) -> None:
        self.masters, self.offload = masters, offload
        self._weights: dict[str, Tensor] = {}
        if not offload:
            self.ensure_initialized()
        self.copy_stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages, as they are after the last update."""
        self.ensure_initialized()
        self.prepare_update()
        if self.copy_stream is not None:
            self.copy_stream.synchronize()
        return self._weights

    @torch.no_grad()
    def ensure_initialized(self) -> None:
        """Make room, if that has not been done, and copy the masters as they are."""
        if not self._weights:
            pool = PinnedPool(offload=self.offload)
            self._weights = {name: pool.place_tensor(master.clone()) for name, master in self.masters()}

    def prepare_update(self, decay: float = 0.0) -> None:
        """Call it before the masters change, with the decay of the update after it.

        What follows on the device waits for an update that runs aside.
        """
        if decay > 0:
            self.ensure_initialized()
        if self.copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self.copy_stream)

    @torch.no_grad()
    def update(self, masters: NamedTensors, decay: float, device: torch.device) -> None:
        """average = decay * average + (1 - decay) * master; decay 0 copies.

        Averages in host memory are updated aside: their copies take longer than one forward pass, and nobody waits.
        """
        if decay == 0 and not self._weights:
            return
        assert self._weights, "settle(decay) comes before the masters change"
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copy_stream):
            averages = prefetched_groups(({"average": weight} for weight in self._weights.values()), device)
            for (_, master), group in zip(masters, averages, strict=True):
                local_tensor(group["average"]).lerp_(local_tensor(master), 1 - decay)

    @contextmanager
    def swapped_into(self, net: nn.Module) -> Iterator[None]:
        """Let `net` compute with the average for a while; its own weights wait in host memory and come back."""
        with torch.no_grad():
            saved = {name: local_tensor(weight).to("cpu", copy=True) for name, weight in net.named_parameters()}
            _copy_weights_into(net, {name: local_tensor(average) for name, average in self.weights.items()})
        try:
            yield
        finally:
            _copy_weights_into(net, saved)


@torch.no_grad()
def _copy_weights_into(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in net.named_parameters():
        local_tensor(weight).copy_(weights[name])
