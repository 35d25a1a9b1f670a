"""LoRA (arXiv 2106.09685): student and critic as two adapters (peft) on one frozen base, which alone is the teacher.

A role is the base with its adapter switched on. Adapters are float32 and sharded with the blocks they sit in.
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
    alpha: float  # an adapter counts alpha / rank


def lora_settings(options: Mapping[str, object]) -> LoraSettings | None:
    """The adapters that the options of a run ask for; None = all weights are trained."""
    rank = int(str(options.get("lora_rank") or 0))
    return LoraSettings(rank, float(str(options.get("lora_alpha") or rank))) if rank else None


class LoraLinear(nn.Module):
    """A linear layer with adapters: peft's, with a forward pass that does not look its adapter up by name.

    So all adapters are one compiled graph, where names would make one for each.
    """

    base_layer: nn.Module
    scaling: dict[str, float]
    merge: Callable[[bool, list[str]], None]  # adds adapters' products to the base weight
    active_factors: tuple[nn.Linear, nn.Linear, float] | None = None  # factors and weight of the adapter that is on

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's result, and that of the adapter which is on."""
        result: Tensor = self.base_layer(x)
        if self.active_factors is None:
            return result
        first, second, weight = self.active_factors
        return result + linear(linear(x, first.weight.to(x.dtype)), second.weight.to(x.dtype)) * weight

    def select_adapter(self, adapter: str | None) -> None:
        """Use an adapter, or none. peft's own `set_adapter` would change which parameters are trained."""
        if adapter is None:
            self.active_factors = None
        else:
            first, second = (self.get_submodule(f"lora_{factor}.{adapter}") for factor in "AB")
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            self.active_factors = first, second, self.scaling[adapter]


def add_adapters(net: WanTransformer, adapter_names: Sequence[str], settings: LoraSettings) -> list[LoraLinear]:
    """Freeze a network and give every matrix of its blocks a trainable float32 adapter of each name; those layers.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("lora_rank: needs peft; pip install 'ti2v-distill[lora]'") from error
    peft_config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated as int, fractions are valid
        target_modules=TARGET_MODULES,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        for name in adapter_names:
            inject_adapter_in_model(peft_config, net, name)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    layers: list[Any] = [module for module in net.modules() if isinstance(module, LoraLayer)]
    layer_types = {kind: type("Switched", (LoraLinear, kind), {}) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = layer_types[type(layer)]
    return layers


class AdapterView(nn.Module):
    """The base with one adapter on, or none; its parameters are that adapter's, under names without the adapter's."""

    def __init__(self, base: WanTransformer, layers: list[LoraLinear], adapter: str | None) -> None:
        super().__init__()
        self.base, self.layers, self.adapter = base, layers, adapter

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Velocity (B C T H W), in a tuple; a backward pass through it finds the same adapter on."""
        self.activate_adapter()
        if self.adapter is not None and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()  # else the first block would be a graph of its own
        (velocity,) = self.base(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict)
        if velocity.requires_grad:  # the blocks are computed again, after other roles have had their turn
            velocity.register_hook(lambda grad: self.activate_adapter())
        return (velocity,)

    def activate_adapter(self) -> None:
        """Use this role's adapter."""
        for layer in self.layers:
            layer.select_adapter(self.adapter)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Only what this role trains."""
        for name, parameter in self.base.named_parameters():
            if ".lora_" in name and f".{self.adapter}." in name:
                yield prefix + name.replace(f".{self.adapter}.", "."), parameter
