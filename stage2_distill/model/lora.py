"""LoRA (arXiv 2106.09685): student and critic as two adapters (peft) on one frozen base, which alone is the teacher.

Each role is the base with its adapter active. Adapters are float32 and sharded with the blocks that hold them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stage2_distill.model.transformer import WanTransformer

TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every matrix of a block


@dataclass(frozen=True)
class LoraSettings:
    """Size and weight of the adapters."""

    rank: int
    alpha: float  # an adapter's product is scaled by alpha / rank

    @property
    def scale(self) -> float:
        """Factor of an adapter's product."""
        return self.alpha / self.rank


def lora_settings(options: Mapping[str, object]) -> LoraSettings | None:
    """The adapters that a run's options request; None = all weights are trained."""
    rank = int(str(options.get("lora_rank") or 0))
    return LoraSettings(rank, float(str(options.get("lora_alpha") or rank))) if rank else None


class LoraLinear(nn.Module):
    """peft's linear layer without its look-up of adapters by name, which would make one compiled graph per adapter."""

    base_layer: nn.Module
    scaling: dict[str, float]
    merge: Callable[[bool, list[str]], None]  # adds the adapters' products to the base weight
    active_factors: tuple[nn.Linear, nn.Linear, float] | None = None  # of the active adapter: A, B, alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's result plus that of the active adapter."""
        result: Tensor = self.base_layer(x)
        if self.active_factors is None:
            return result
        first, second, weight = self.active_factors
        return result + linear(linear(x, first.weight.to(x.dtype)), second.weight.to(x.dtype)) * weight

    def select_adapter(self, adapter: str | None) -> None:
        """Activate an adapter, or none; peft's own `set_adapter` would also change which parameters are trained."""
        if adapter is None:
            self.active_factors = None
            return
        first, second = (self.get_submodule(f"lora_{factor}.{adapter}") for factor in "AB")
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear), adapter
        self.active_factors = first, second, self.scaling[adapter]


def add_adapters(net: WanTransformer, adapter_names: Sequence[str], settings: LoraSettings) -> list[LoraLinear]:
    """Freeze a network, add a trainable float32 adapter per name to every matrix of its blocks; return those layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("lora_rank: needs peft; pip install 'ti2v-distill[lora]'") from error
    alpha: Any = settings.alpha  # annotated as int in peft, but fractions are valid
    peft_config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=TARGET_MODULES)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are intended
        for name in adapter_names:
            inject_adapter_in_model(peft_config, net, name)
    for name, parameter in net.named_parameters():  # peft leaves the base as it is and creates adapters in its dtype
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    layers: list[Any] = [module for module in net.modules() if isinstance(module, LoraLayer)]
    # One class per peft class, not per layer: torch.compile guards on the class of each layer.
    classes = {kind: type("SwitchedLinear", (LoraLinear, kind), {}) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = classes[type(layer)]
    return layers


class AdapterView(nn.Module):
    """The base with one adapter active, or none; its parameters are that adapter's, without the adapter's name."""

    def __init__(self, base: WanTransformer, layers: list[LoraLinear], adapter: str | None) -> None:
        super().__init__()
        self.base, self.layers, self.adapter = base, layers, adapter

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Velocity (B C T H W), in a tuple; its backward pass runs with the same adapter active."""
        self.activate_adapter()
        if self.adapter is not None and torch.is_grad_enabled() and not hidden_states.requires_grad:
            # Inputs without gradient would give the first block a compiled graph of its own.
            hidden_states = hidden_states.detach().requires_grad_()
        (velocity,) = self.base(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict)
        if velocity.requires_grad:  # checkpointed blocks are recomputed after other roles have run
            velocity.register_hook(lambda grad: self.activate_adapter())
        return (velocity,)

    def activate_adapter(self) -> None:
        """Activate this role's adapter in all layers."""
        for layer in self.layers:
            layer.select_adapter(self.adapter)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this role trains."""
        for name, parameter in self.base.named_parameters():
            if ".lora_" in name and f".{self.adapter}." in name:
                yield prefix + name.replace(f".{self.adapter}.", "."), parameter
