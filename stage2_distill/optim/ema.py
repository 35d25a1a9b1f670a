"""Exponential moving averages of the float32 master weights of student and critic, shard by shard."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.condition import Denoiser
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.model.weight_loading import blend_weights, copy_weights
from stage2_distill.offload.pinned_memory import PinnedPool
from stage2_distill.offload.prefetch import prefetched_groups

NamedTensors = Iterable[tuple[str, Tensor]]


class EmaWeights:
    """A moving average of `masters()`; under FSDP each rank averages only the shards that it holds.

    With `offload` the average lives in host memory, which it takes only when it is read or differs from the masters.
    """

    def __init__(self, masters: Callable[[], NamedTensors], device: torch.device, *, offload: bool = False) -> None:
        self.masters, self.device, self.offload = masters, device, offload
        self._weights: dict[str, Tensor] = {}
        if not offload:
            self._initialize()
        self.copy_stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages by name after the last update."""
        self._initialize()
        if self.copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self.copy_stream)
            self.copy_stream.synchronize()  # the host reads them next
        return self._weights

    @contextmanager
    def update_after(self, decay: float) -> Iterator[None]:
        """Surrounds an optimizer step, then sets average = decay * average + (1 - decay) * master; decay 0 copies.

        An average in host memory is updated on a stream of its own, because its copies take longer than a forward pass;
        the device waits for them before the next step, which changes what they read. An error inside leaves the average
        as it is.
        """
        if decay > 0:
            self._initialize()
        if self.copy_stream is not None:
            torch.cuda.current_stream().wait_stream(self.copy_stream)
        yield
        if decay > 0 or self._weights:  # else it is a plain copy, which takes no memory yet
            self._update(decay)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Allocate memory, unless that is done, and copy the masters."""
        if not self._weights:
            pool = PinnedPool(offload=self.offload)
            self._weights = {name: pool.place_tensor(master.clone()) for name, master in self.masters()}

    @torch.no_grad()
    def _update(self, decay: float) -> None:
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream())  # until the step is done
        with torch.cuda.stream(self.copy_stream):
            averages = prefetched_groups(({"average": weight} for weight in self._weights.values()), self.device)
            for (_, master), group in zip(self.masters(), averages, strict=True):
                # lerp with weight 1 copies exactly
                local_tensor(group["average"]).lerp_(local_tensor(master), 1 - decay)

    @contextmanager
    def swapped_into(self, net: nn.Module) -> Iterator[None]:
        """Let `net` compute with the average; its own weights wait in host memory and come back afterwards."""
        with torch.no_grad():
            saved = {name: local_tensor(weight).to("cpu", copy=True) for name, weight in net.named_parameters()}
            _copy_weights_into(net, {name: local_tensor(average) for name, average in self.weights.items()})
        try:
            yield
        finally:
            _copy_weights_into(net, saved)


class CriticAverage:
    """A network whose weights are the moving average of the critic's, so that it can stand for it without a swap.

    They take 4 bytes per trained parameter, sharded as the critic's: float32, or bf16 and the 16 bits that those lack.
    """

    def __init__(self, net: nn.Module, denoiser: Denoiser, masters: Callable[[], NamedTensors], decay: float) -> None:
        self.net, self.denoiser, self.masters, self.decay = net.requires_grad_(False), denoiser, masters, decay
        self.weights: dict[str, Tensor] = dict(net.named_parameters())  # FSDP may replace what a detached one refers to
        self.remainders = {
            name: torch.zeros_like(weight, dtype=torch.int16)
            for name, weight in self.weights.items()
            if weight.dtype == torch.bfloat16
        }
        self.copy_critic()

    def copy_critic(self) -> None:
        """Start again from the critic's present weights."""
        copy_weights(self.masters(), self.weights, self.remainders)

    def update(self) -> None:
        """Set average = decay * average + (1 - decay) * critic, after an update of the critic."""
        blend_weights(self.masters(), self.weights, self.remainders, 1 - self.decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """The live tensors of the average by name."""
        return self.weights | {f"{name}.remainder": rest for name, rest in self.remainders.items()}


@torch.no_grad()
def _copy_weights_into(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, weight in net.named_parameters():
        local_tensor(weight).copy_(weights[name])
