"""How the trained roles are kept in memory: float32 masters, or the compact form where they would not fit."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from stage2_distill.attention import check_kernel
from stage2_distill.checkpoint import checkpoints, read_facts
from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig
from stage2_distill.ema import Ema
from stage2_distill.lora import Role, lora_of, open_adapted
from stage2_distill.network import Network, Plan
from stage2_distill.optim import masters, open_ema, open_optimizer, remainders
from stage2_distill.parallel import Ranks, shard
from stage2_distill.schedule import CRITIC, STUDENT
from stage2_distill.train import Roles
from stage2_distill.wan import skeleton
from stage2_distill.weights import copy_weights, read_weights

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
        net = shard(skeleton(model, dtype, plan), ranks, compute)
        return net, open_optimizer(net, role, config, ranks, memory)

    (student, student_optimizer), (critic, critic_optimizer) = trained(STUDENT), trained(CRITIC)
    teacher = shard(skeleton(model, compute, plan), ranks, compute).requires_grad_(False)
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
