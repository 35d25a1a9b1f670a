"""LoRA (arXiv 2106.09685): student and critic as two adapters (peft) on one frozen base, which alone is the teacher.

A role is the base with its adapter switched on. Adapters are float32 and sharded with the blocks they sit in.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

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


class Layer(Protocol):
    """A linear layer with adapters, as peft makes it."""

    _active_adapter: list[str]

    def merge(self, safe_merge: bool, adapter_names: list[str]) -> None:
        """Add an adapter's product to the base weight."""

    def get_base_layer(self) -> nn.Module:
        """The layer without adapters."""


def add_adapters(net: Network, names: Sequence[str], lora: Lora) -> list[Layer]:
    """Freeze a network and give every matrix of its blocks a trainable float32 adapter of each name; those layers.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("lora_rank: needs peft; pip install 'ti2v-distill[lora]'") from error
    wanted = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        for name in names:
            inject_adapter_in_model(wanted, net, name)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return [module for module in net.modules() if isinstance(module, LoraLayer)]


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
        (velocity,) = self.base(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict)
        if velocity.requires_grad:  # the blocks are computed again, after other roles have had their turn
            velocity.register_hook(lambda grad: self.switch_on())
        return (velocity,)

    def switch_on(self) -> None:
        """Use this role's adapter. peft's own `set_adapter` would change which parameters are trained."""
        for layer in self.layers:
            layer._active_adapter = [] if self.adapter is None else [self.adapter]

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
    shard(net, ranks, dtype)
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
        net.get_submodule(parent).add_module(child, layer.get_base_layer())
    net.requires_grad_(False)
