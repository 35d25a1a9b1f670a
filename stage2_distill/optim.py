"""The optimizers."""

import torch
from torch import Tensor, nn

from stage2_distill.config import DistillConfig


def adamw(net: nn.Module, lr: float, config: DistillConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of `net`, its state made at once so that a checkpoint can fill it."""
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


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
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
