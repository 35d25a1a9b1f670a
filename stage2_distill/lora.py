"""LoRA (arXiv 2106.09685): student and critic as two adapters (peft) on one frozen base, which alone is the teacher.

A role is the base with its adapter switched on. Adapters are float32 and sharded with the blocks they sit in.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from common.seed import generator
from stage2_distill.checkpoint import load
from stage2_distill.network import Network, Plan
from stage2_distill.parallel import Ranks, shard
from stage2_distill.schedule import CRITIC, STUDENT
from stage2_distill.wan import skeleton
from stage2_distill.weights import fill, read_weights

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every matrix of a block


@dataclass(frozen=True)
class Lora:
    """Size and weight of the adapters."""

    rank: int
    alpha: float  # an adapter counts alpha / rank


def lora_of(options: Mapping[str, object]) -> Lora | None:
    """The adapters that the options of a run ask for; None = all weights are trained."""
    rank = int(str(options.get("lora_rank") or 0))
    return Lora(rank, float(str(options.get("lora_alpha") or rank))) if rank else None


class Layer(nn.Module):
    """A linear layer with adapters: peft's, with a forward pass that does not look its adapter up by name.

    So all adapters are one compiled graph, where names would make one for each.
    """

    base_layer: nn.Module
    scaling: dict[str, float]
    merge: Callable[[bool, list[str]], None]  # adds adapters' products to the base weight
    used: tuple[nn.Linear, nn.Linear, float] | None = None  # factors and weight of the adapter that is on

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's result, and that of the adapter which is on."""
        result: Tensor = self.base_layer(x)
        if self.used is None:
            return result
        first, second, weight = self.used
        return result + linear(linear(x, first.weight.to(x.dtype)), second.weight.to(x.dtype)) * weight

    def switch(self, adapter: str | None) -> None:
        """Use an adapter, or none. peft's own `set_adapter` would change which parameters are trained."""
        if adapter is None:
            self.used = None
        else:
            first, second = (self.get_submodule(f"lora_{factor}.{adapter}") for factor in "AB")
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            self.used = first, second, self.scaling[adapter]


def add_adapters(net: Network, names: Sequence[str], lora: Lora) -> list[Layer]:
    """Freeze a network and give every matrix of its blocks a trainable float32 adapter of each name; those layers.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("lora_rank: needs peft; pip install 'ti2v-distill[lora]'") from error
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as int, fractions are valid
        target_modules=TARGETS,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        for name in names:
            inject_adapter_in_model(wanted, net, name)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    layers: list[Any] = [module for module in net.modules() if isinstance(module, LoraLayer)]
    kinds = {kind: type("Switched", (Layer, kind), {}) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = kinds[type(layer)]
    return layers


class Role(nn.Module):
    """The base with one adapter on, or none; its parameters are that adapter's, under names without the adapter's."""

    def __init__(self, base: Network, layers: list[Layer], adapter: str | None) -> None:
        super().__init__()
        self.base, self.layers, self.adapter = base, layers, adapter

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Velocity (B C T H W), in a tuple; a backward pass through it finds the same adapter on."""
        self.switch_on()
        if self.adapter is not None and torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()  # else the first block would be a graph of its own
        (velocity,) = self.base(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict)
        if velocity.requires_grad:  # the blocks are computed again, after other roles have had their turn
            velocity.register_hook(lambda grad: self.switch_on())
        return (velocity,)

    def switch_on(self) -> None:
        """Use this role's adapter."""
        for layer in self.layers:
            layer.switch(self.adapter)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Only what this role trains."""
        for name, parameter in self.base.named_parameters():
            if ".lora_" in name and f".{self.adapter}." in name:
                yield prefix + name.replace(f".{self.adapter}.", "."), parameter


def open_adapted(model: Path, ranks: Ranks, plan: Plan, lora: Lora, *, dtype: torch.dtype, seed: int) -> list[Role]:
    """Student, teacher and critic on one base of `dtype`; adapters begin without effect."""
    net = skeleton(model, dtype, plan)
    layers = add_adapters(net, (STUDENT, CRITIC), lora)
    shard(net, ranks, dtype, casts=True)
    base = {name.replace(".base_layer.", "."): p for name, p in net.named_parameters() if ".lora_" not in name}
    read_weights(model / "transformer", base)
    student, teacher, critic = (Role(net, layers, adapter) for adapter in (STUDENT, None, CRITIC))
    for role in (student, critic):
        draw(role, seed)
    return [student, teacher, critic]


@dataclass(frozen=True)
class Drawn:
    """A whole tensor from which each rank takes its part."""

    whole: Tensor

    def get_shape(self) -> list[int]:
        """Shape of the whole."""
        return list(self.whole.shape)

    def __getitem__(self, part: object) -> Tensor:
        return self.whole[part]  # type: ignore[index]


@torch.no_grad()
def draw(role: Role, seed: int) -> None:
    """First factors uniform within 1/sqrt(inputs), as nn.Linear; second factors zero: the role begins as the base."""
    for name, weight in role.named_parameters():
        whole = torch.zeros(weight.shape)
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            whole.uniform_(-bound, bound, generator=generator(seed, 0, 0, f"{role.adapter} {name}"))
        fill(weight, Drawn(whole), name)


def load_merged(net: Network, checkpoint: Path, weights: str, lora: Lora) -> None:
    """Add the adapter `weights` (student or ema) of a checkpoint to a plain network's own weights."""
    layers = add_adapters(net, (weights,), lora)
    load(checkpoint, {f"{weights}.{name}": value.data for name, value in Role(net, layers, weights).named_parameters()})
    for name, layer in [(name, module) for name, module in net.named_modules() if module in layers]:
        layer.merge(False, [weights])
        parent, _, child = name.rpartition(".")
        net.get_submodule(parent).add_module(child, layer.base_layer)
    net.requires_grad_(False)
