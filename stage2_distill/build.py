"""Builds the trainer: networks, adapters, optimizers and average, in the memory form that fits the GPUs."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.seed import make_generator
from common.timer import PhaseTimer
from shards.dataset import DataSet
from shards.mixture import DataSetMixture
from shards.record import pad_text
from stage2_distill.checkpointing.format import list_checkpoints, read_facts
from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig
from stage2_distill.distributed.fsdp import apply_fsdp
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.model.attention import check_kernel
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.lora import AdapterView, LoraSettings, add_adapters, lora_settings
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import build_meta_transformer, materialize_transformer
from stage2_distill.model.weight_loading import copy_weights, fill_parameter, read_weights
from stage2_distill.optim.ema import EmaWeights
from stage2_distill.optim.optimizers import build_ema, build_optimizer, master_remainders, master_weights
from stage2_distill.trainer import RoleNetworks, Trainer

STANDARD_BYTES_PER_PARAMETER = (
    26  # a parameter: two roles' masters and second moments (8 each), gradients 4, average 4, teacher 2
)
RESERVED_BYTES = 20 << 30  # bytes of activations, of gathered weights and of what torch reserves beyond them


def choose_optimizer_form(config: DistillConfig, ranks: RankContext, parameters: int) -> str:
    """The memory mode; `auto` is that of the run's checkpoints, or compact where standard would not fit the GPUs."""
    if config.optimizer_form != AUTO:
        return config.optimizer_form
    for checkpoint in reversed(list_checkpoints(Path(config.out))):
        with suppress(ValueError, TypeError, KeyError):  # a damaged one; whoever resumes sets it aside
            if form := read_facts(checkpoint).memory:
                return form
    if ranks.device.type != "cuda" or config.dtype != "bfloat16" or config.beta1 != 0:
        return STANDARD
    _, total = torch.cuda.mem_get_info(ranks.device)
    shards = ranks.world // config.replicate
    return COMPACT if STANDARD_BYTES_PER_PARAMETER * parameters // shards + RESERVED_BYTES > total else STANDARD


@dataclass(frozen=True)
class BuiltRoles:
    """The three roles from one folder, and what training them needs."""

    roles: RoleNetworks
    student_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    ema: EmaWeights


def build_roles(config: DistillConfig, ranks: RankContext, model: Path) -> BuiltRoles:
    """Three networks, sharded before they have memory; trained ones have float32 masters, the teacher has none.

    Or one network with two adapters. ValueError where the kernel of attention cannot serve them.
    """
    compute_dtype = getattr(torch, config.dtype)
    meta_net = build_meta_transformer(model, compute_dtype)
    check_kernel(config.attention, meta_net.config.attention_head_dim, compute_dtype, ranks.device)
    plan = ExecutionPlan(config.attention, config.activation_checkpointing, config.compile)
    adapter_settings = lora_settings(vars(config))
    if adapter_settings is not None:
        return build_lora_roles(
            config,
            ranks,
            build_adapter_views(model, ranks, plan, adapter_settings, dtype=compute_dtype, seed=config.seed),
        )
    form = choose_optimizer_form(config, ranks, sum(p.numel() for p in meta_net.parameters()))

    def build_trained(role: str) -> tuple[WanTransformer, torch.optim.Optimizer]:
        dtype = torch.float32 if form == STANDARD else compute_dtype
        net = materialize_transformer(
            apply_fsdp(build_meta_transformer(model, dtype, plan), ranks, compute_dtype), ranks.device
        )
        return net, build_optimizer(net, role, config, ranks, form)

    (student, student_optimizer), (critic, critic_optimizer) = build_trained(STUDENT), build_trained(CRITIC)
    teacher = materialize_transformer(
        apply_fsdp(build_meta_transformer(model, compute_dtype, plan), ranks, compute_dtype), ranks.device
    ).requires_grad_(False)
    read_weights(model / "transformer", dict(student.named_parameters()), master_remainders(student, student_optimizer))
    for net, critic_remainders in ((critic, master_remainders(critic, critic_optimizer)), (teacher, {})):
        copy_weights(master_weights(student, student_optimizer), dict(net.named_parameters()), critic_remainders)
    ema = build_ema(student, student_optimizer, config, ranks)
    return BuiltRoles(RoleNetworks(student, teacher, critic), student_optimizer, critic_optimizer, ema)


def build_lora_roles(config: DistillConfig, ranks: RankContext, views: list[AdapterView]) -> BuiltRoles:
    """Student, teacher and critic of one base; the adapters are their own float32 masters."""
    student, teacher, critic = views
    student_optimizer, critic_optimizer = (
        build_optimizer(role, name, config, ranks, STANDARD) for role, name in ((student, STUDENT), (critic, CRITIC))
    )
    ema = build_ema(student, student_optimizer, config, ranks)
    return BuiltRoles(RoleNetworks(student, teacher, critic), student_optimizer, critic_optimizer, ema)


def build_adapter_views(
    model: Path, ranks: RankContext, plan: ExecutionPlan, settings: LoraSettings, *, dtype: torch.dtype, seed: int
) -> list[AdapterView]:
    """Student, teacher and critic on one base of `dtype`; adapters begin without effect."""
    net = build_meta_transformer(model, dtype, plan)
    layers = add_adapters(net, (STUDENT, CRITIC), settings)
    materialize_transformer(apply_fsdp(net, ranks, dtype, net_casts=True), ranks.device)
    base = {name.replace(".base_layer.", "."): p for name, p in net.named_parameters() if ".lora_" not in name}
    read_weights(model / "transformer", base)
    student, teacher, critic = (AdapterView(net, layers, adapter) for adapter in (STUDENT, None, CRITIC))
    for role in (student, critic):
        initialize_adapters(role, seed)
    return [student, teacher, critic]


@dataclass(frozen=True)
class InMemoryTensor:
    """A whole tensor from which each rank takes its part."""

    full_tensor: Tensor

    def get_shape(self) -> list[int]:
        """Shape of the whole."""
        return list(self.full_tensor.shape)

    def __getitem__(self, index: object) -> Tensor:
        return self.full_tensor[index]  # type: ignore[index]


@torch.no_grad()
def initialize_adapters(role: AdapterView, seed: int) -> None:
    """First factors uniform within 1/sqrt(inputs), as nn.Linear; second factors zero: the role begins as the base."""
    for name, weight in role.named_parameters():
        whole = torch.zeros(weight.shape)
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            whole.uniform_(-bound, bound, generator=make_generator(seed, 0, 0, f"{role.adapter} {name}"))
        fill_parameter(weight, InMemoryTensor(whole), name)


def build_trainer(config: DistillConfig, ranks: RankContext, model: Path, data: DataSet | DataSetMixture) -> Trainer:
    """The three roles from one folder, sharded, with their optimizers."""
    opened = build_roles(config, ranks, model)
    return Trainer(
        config,
        ranks,
        opened.roles,
        opened.student_optimizer,
        opened.critic_optimizer,
        opened.ema,
        pad_text(data.negative, config.max_text_tokens).to(ranks.device),
        PhaseTimer(ranks.device),
        RolloutReuse(config, ranks.world),
    )
