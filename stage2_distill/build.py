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
from stage2_distill.checkpointing.format import checkpoints, read_facts
from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig
from stage2_distill.distributed.fsdp import shard
from stage2_distill.distributed.process_group import Ranks
from stage2_distill.dmd.rollout_reuse import Reuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.model.attention import check_kernel
from stage2_distill.model.layers import Plan
from stage2_distill.model.lora import Lora, Role, add_adapters, lora_of
from stage2_distill.model.transformer import Network
from stage2_distill.model.wan import materialise, skeleton
from stage2_distill.model.weight_loading import copy_weights, fill, read_weights
from stage2_distill.optim.ema import Ema
from stage2_distill.optim.optimizers import masters, open_ema, open_optimizer, remainders
from stage2_distill.trainer import Roles, Trainer

STANDARD_BYTES = 26  # a parameter: two roles' masters and second moments (8 each), gradients 4, average 4, teacher 2
REST = 20 << 30  # bytes of activations, of gathered weights and of what torch reserves beyond them


def choose_memory(config: DistillConfig, ranks: Ranks, parameters: int) -> str:
    """The memory mode; `auto` is that of the run's checkpoints, or compact where standard would not fit the GPUs."""
    if config.memory != AUTO:
        return config.memory
    for checkpoint in reversed(checkpoints(Path(config.out))):
        with suppress(ValueError, TypeError, KeyError):  # a damaged one; whoever resumes sets it aside
            if memory := read_facts(checkpoint).memory:
                return memory
    if ranks.device.type != "cuda" or config.dtype != "bfloat16" or config.beta1 != 0:
        return STANDARD
    _, total = torch.cuda.mem_get_info(ranks.device)
    shards = ranks.world // config.replicate
    return COMPACT if STANDARD_BYTES * parameters // shards + REST > total else STANDARD


@dataclass(frozen=True)
class Opened:
    """The three roles from one folder, and what training them needs."""

    roles: Roles
    student_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    ema: Ema


def open_roles(config: DistillConfig, ranks: Ranks, model: Path) -> Opened:
    """Three networks, sharded before they have memory; trained ones have float32 masters, the teacher has none.

    Or one network with two adapters. ValueError where the kernel of attention cannot serve them.
    """
    compute = getattr(torch, config.dtype)
    bare = skeleton(model, compute)
    check_kernel(config.attention, bare.config.attention_head_dim, compute, ranks.device)
    plan = Plan(config.attention, config.keep_activations, config.compile)
    lora = lora_of(vars(config))
    if lora is not None:
        return open_lora(config, ranks, open_adapted(model, ranks, plan, lora, dtype=compute, seed=config.seed))
    memory = choose_memory(config, ranks, sum(p.numel() for p in bare.parameters()))

    def trained(role: str) -> tuple[Network, torch.optim.Optimizer]:
        dtype = torch.float32 if memory == STANDARD else compute
        net = materialise(shard(skeleton(model, dtype, plan), ranks, compute), ranks.device)
        return net, open_optimizer(net, role, config, ranks, memory)

    (student, student_optimizer), (critic, critic_optimizer) = trained(STUDENT), trained(CRITIC)
    teacher = materialise(shard(skeleton(model, compute, plan), ranks, compute), ranks.device).requires_grad_(False)
    read_weights(model / "transformer", dict(student.named_parameters()), remainders(student, student_optimizer))
    for net, low in ((critic, remainders(critic, critic_optimizer)), (teacher, {})):
        copy_weights(masters(student, student_optimizer), dict(net.named_parameters()), low)
    ema = open_ema(student, student_optimizer, config, ranks)
    return Opened(Roles(student, teacher, critic), student_optimizer, critic_optimizer, ema)


def open_lora(config: DistillConfig, ranks: Ranks, adapted: list[Role]) -> Opened:
    """Student, teacher and critic of one base; the adapters are their own float32 masters."""
    student, teacher, critic = adapted
    student_optimizer, critic_optimizer = (
        open_optimizer(role, name, config, ranks, STANDARD) for role, name in ((student, STUDENT), (critic, CRITIC))
    )
    ema = open_ema(student, student_optimizer, config, ranks)
    return Opened(Roles(student, teacher, critic), student_optimizer, critic_optimizer, ema)


def open_adapted(model: Path, ranks: Ranks, plan: Plan, lora: Lora, *, dtype: torch.dtype, seed: int) -> list[Role]:
    """Student, teacher and critic on one base of `dtype`; adapters begin without effect."""
    net = skeleton(model, dtype, plan)
    layers = add_adapters(net, (STUDENT, CRITIC), lora)
    materialise(shard(net, ranks, dtype, casts=True), ranks.device)
    base = {name.replace(".base_layer.", "."): p for name, p in net.named_parameters() if ".lora_" not in name}
    read_weights(model / "transformer", base)
    student, teacher, critic = (Role(net, layers, adapter) for adapter in (STUDENT, None, CRITIC))
    for role in (student, critic):
        initialize_adapters(role, seed)
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
def initialize_adapters(role: Role, seed: int) -> None:
    """First factors uniform within 1/sqrt(inputs), as nn.Linear; second factors zero: the role begins as the base."""
    for name, weight in role.named_parameters():
        whole = torch.zeros(weight.shape)
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            whole.uniform_(-bound, bound, generator=make_generator(seed, 0, 0, f"{role.adapter} {name}"))
        fill(weight, Drawn(whole), name)


def open_trainer(config: DistillConfig, ranks: Ranks, model: Path, data: DataSet | DataSetMixture) -> Trainer:
    """The three roles from one folder, sharded, with their optimizers."""
    opened = open_roles(config, ranks, model)
    return Trainer(
        config,
        ranks,
        opened.roles,
        opened.student_optimizer,
        opened.critic_optimizer,
        opened.ema,
        pad_text(data.negative, config.text_rows).to(ranks.device),
        PhaseTimer(ranks.device),
        Reuse(config, ranks.world),
    )
