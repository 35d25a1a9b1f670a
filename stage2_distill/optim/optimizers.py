"""The optimizers, and what differs between them: gradient clipping and where the float32 masters are."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stage2_distill.config import COMPACT, STANDARD, DistillConfig
from stage2_distill.distributed.fsdp import clip_grad_norm
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import STUDENT, accumulation_steps
from stage2_distill.optim.adamw import PlainAdamW
from stage2_distill.optim.compact_adamw import CompactAdamW
from stage2_distill.optim.ema import EmaWeights


def build_optimizer(
    net: nn.Module, role: str, config: DistillConfig, ranks: RankContext, form: str
) -> torch.optim.Optimizer:
    """The optimizer of a role in a memory mode.

    The student's is used in one of `student_update_interval` iterations: its state may wait in host memory where a GPU holds all,
    and makes room there for gradients that are summed in float32.
    """
    lr = config.student_lr if role == STUDENT else config.critic_lr
    settings = {"lr": lr, "beta2": config.beta2, "eps": config.eps, "weight_decay": config.weight_decay}
    if form == STANDARD:
        return PlainAdamW(net, settings) if config.beta1 == 0 else build_torch_adamw(net, lr, config)
    accumulate = accumulation_steps(config, ranks.world) > 1
    may_offload = config.offload == "all" or (config.offload == "average" and accumulate)
    return CompactAdamW(
        net,
        settings,
        moment=config.second_moment,
        offload=role == STUDENT and may_offload and is_unsharded(config, ranks),
        accumulate=accumulate,
    )


def optimizer_form(optimizer: torch.optim.Optimizer) -> str:
    """The memory mode in which an optimizer's role is kept."""
    return COMPACT if isinstance(optimizer, CompactAdamW) else STANDARD


def build_ema(
    student: nn.Module, optimizer: torch.optim.Optimizer, config: DistillConfig, ranks: RankContext
) -> EmaWeights:
    """The student's average, in host memory where it is to wait there."""
    compact = isinstance(optimizer, CompactAdamW)
    offload = compact and config.offload != "none" and is_unsharded(config, ranks)
    return EmaWeights(lambda: master_weights(student, optimizer), offload=offload)


def is_unsharded(config: DistillConfig, ranks: RankContext) -> bool:
    """Whether each rank holds whole networks, alone or as one of the replicas."""
    return config.replicate == ranks.world


def clip_gradients(net: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale the gradients of all ranks to a global norm of at most `limit`; the norm before that, a scalar."""
    return optimizer.clip_gradients(limit) if isinstance(optimizer, CompactAdamW) else clip_grad_norm(net, limit)


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> bool:
    """Take a step that changes no weight unless `fine`, a boolean on the device; False where the optimizer has none."""
    if isinstance(optimizer, CompactAdamW):
        optimizer.skip_step_unless(finite)
        optimizer.step()
        return True
    return False


def master_weights(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 masters of all parameters, one at a time."""
    names = [name for name, _ in net.named_parameters()]
    tensors = (
        optimizer.master_weights() if isinstance(optimizer, CompactAdamW) else (p.detach() for p in net.parameters())
    )
    yield from zip(names, tensors, strict=True)


def master_remainders(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the masters have more than the weights, by name; nothing where the weights are the masters."""
    if not isinstance(optimizer, CompactAdamW):
        return {}
    return {name: optimizer.state[weight]["remainder"] for name, weight in net.named_parameters()}


def build_torch_adamw(net: nn.Module, lr: float, config: DistillConfig) -> torch.optim.AdamW:
    """torch's AdamW, for a first moment; its state is made at once so that a checkpoint can fill it."""
    optimizer = torch.optim.AdamW(
        net.parameters(),
        lr=lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    for parameter in net.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as {parameter.slot: tensor}, the live tensors themselves."""
    return {
        f"{name}.{slot}": value
        for name, parameter in net.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }
