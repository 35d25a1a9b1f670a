"""Distribution Matching Distillation: three roles, one step, the loop.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.condition import Condition, Denoiser
from common.device import copy_async, record_event
from common.flow import score_sigma
from common.seed import draw_normal, draw_uniform, make_generator
from common.timer import PhaseTimer
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.fsdp import reduce_gradients
from stage2_distill.distributed.process_group import Ranks, of_all_ranks
from stage2_distill.dmd.latent_stats import LOOKS, look
from stage2_distill.dmd.losses import critic_loss, dmd_loss
from stage2_distill.dmd.rollout import rollout
from stage2_distill.dmd.rollout_reuse import Reuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT, Part, exit_index, learning_rate, score_bounds, student_turn
from stage2_distill.model.wan import denoiser, guided
from stage2_distill.monitoring.metrics_log import Step, Update
from stage2_distill.optim.ema import Ema
from stage2_distill.optim.optimizers import clip, masters, set_rate, step_if

Loss = Callable[[Tensor, Condition, Tensor, Tensor], Tensor]  # (x0, condition, sigma, eps) -> scalar


class DivergedError(RuntimeError):
    """A loss or gradient is not finite; the message names the iteration and the last good checkpoint."""


@dataclass(frozen=True)
class Roles:
    """The three networks, all started from the same weights."""

    student: nn.Module
    teacher: nn.Module
    critic: nn.Module


@dataclass(frozen=True)
class Trainer:
    """All that an iteration needs besides its data."""

    config: DistillConfig
    ranks: Ranks
    roles: Roles
    student_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    ema: Ema
    negative_text: Tensor  # (L D)
    clock: PhaseTimer
    reuse: Reuse

    def denoiser(self, net: nn.Module) -> Denoiser:
        """A role as a function to x0."""
        return denoiser(net, getattr(torch, self.config.dtype))


def train_step(trainer: Trainer, iteration: int, data: Iterator[tuple[Part, Condition]]) -> Step:
    """One iteration of DMD2, algorithm 1: now and then the student, always the critic."""
    student = None
    if student_turn(iteration, trainer.config):
        student = update_student(trainer, iteration, data)
        averaged = masters(trainer.roles.student, trainer.student_optimizer)
        trainer.ema.update(averaged, ema_decay(iteration, trainer.config), trainer.ranks.device)
    critic = update_critic(trainer, iteration, data)
    return Step(student, critic, trainer.clock.read())


def ema_decay(iteration: int, config: DistillConfig) -> float:
    """Decay after a student update: 0, a plain copy, up to iteration `ema_start`."""
    return config.ema_decay if iteration > config.ema_start else 0.0


def update_student(trainer: Trainer, iteration: int, data: Iterator[tuple[Part, Condition]]) -> Update:
    """Move the student's law towards the teacher's (DMD eq. 7), with a gradient at one step of the rollout."""
    critic = trainer.denoiser(trainer.roles.critic)
    teacher = guided(
        trainer.denoiser(trainer.roles.teacher),
        negative_text=trainer.negative_text,
        scale=trainer.config.guidance_scale,
    )

    def loss(x0: Tensor, condition: Condition, sigma: Tensor, eps: Tensor) -> Tensor:
        return dmd_loss(x0, condition, teacher=teacher, critic=critic, sigma=sigma, eps=eps)

    exit_at = exit_index(iteration, STUDENT, trainer.config)
    value = accumulate(trainer, data, loss, net=trainer.roles.student, exit_at=exit_at)
    trainer.ema.settle(ema_decay(iteration, trainer.config))
    set_rate(trainer.student_optimizer, learning_rate(iteration, STUDENT, trainer.config))
    return apply(trainer, trainer.roles.student, trainer.student_optimizer, value, exit_at)


def update_critic(trainer: Trainer, iteration: int, data: Iterator[tuple[Part, Condition]]) -> Update:
    """Teach the critic the student's present law (DMD2 section 4.2), on a rollout without gradient."""
    critic = trainer.denoiser(trainer.roles.critic)

    def loss(x0: Tensor, condition: Condition, sigma: Tensor, eps: Tensor) -> Tensor:
        return critic_loss(x0, condition, critic=critic, sigma=sigma, eps=eps, kind=trainer.config.critic_loss)

    exit_at = exit_index(iteration, CRITIC, trainer.config)
    value = accumulate(trainer, data, loss, net=trainer.roles.critic, exit_at=exit_at)
    left = trainer.reuse.taken or {exit_at}
    shared = left.pop() if len(left) == 1 else None
    trainer.reuse.taken.clear()
    set_rate(trainer.critic_optimizer, learning_rate(iteration, CRITIC, trainer.config))
    return apply(trainer, trainer.roles.critic, trainer.critic_optimizer, value, shared)


def accumulate(
    trainer: Trainer, data: Iterator[tuple[Part, Condition]], loss: Loss, *, net: nn.Module, exit_at: int
) -> Tensor:
    """Add up the gradients of `net` over the micro-batches of one update; this rank's mean loss and looks (4)."""
    total = torch.zeros(1 + len(LOOKS), device=trainer.ranks.device)
    for part, condition in trainer.clock.time_items(data, "data"):
        reduce_gradients(net, part.last)
        with trainer.clock("rollout"), torch.set_grad_enabled(part.role == STUDENT):
            x0, condition, exit_at = simulate(trainer, part, condition, exit_at)
        with trainer.clock("scores"):
            sigma, eps = score_draws(trainer, part, x0, exit_at)
            value = loss(x0, condition, sigma, eps)
        with trainer.clock("backward"):
            (value * part.share).backward()
        total += torch.cat([value.detach()[None], look(x0, condition)]) * part.share
        if part.last:
            break
    return total


def simulate(trainer: Trainer, part: Part, condition: Condition, exit_at: int) -> tuple[Tensor, Condition, int]:
    """The student's x0 (B C T H W) for one micro-batch, from pure noise down to ladder step `exit_at`.

    And what it was made from, and its step: other ones where a rollout is used again.
    """
    config = trainer.config
    if part.role == CRITIC and config.rollout_reuse:
        return trainer.reuse.sample(trainer.denoiser(trainer.roles.student), part, condition)
    draws = [
        make_generator(config.seed, part.iteration, sample, f"{part.role} rollout", trainer.ranks.device)
        for sample in part.samples
    ]
    x0 = rollout(
        trainer.denoiser(trainer.roles.student),
        draw_normal(config.spec.latent_shape, draws),
        condition,
        ladder=config.sigmas,
        generators=draws,
        exit_index=exit_at,
    )
    return x0, condition, exit_at


def score_draws(trainer: Trainer, part: Part, x0: Tensor, exit_at: int) -> tuple[Tensor, Tensor]:
    """Where the scores are compared: sigma (B) and noise (B C T H W)."""
    config = trainer.config
    draws = [
        make_generator(config.seed, part.iteration, sample, f"{part.role} score", trainer.ranks.device)
        for sample in part.samples
    ]
    low, high = score_bounds(exit_at, config)
    u = low + (high - low) * draw_uniform(draws)
    sigma = score_sigma(u, s=config.shift, low=config.score_low, high=config.score_high)
    return sigma, draw_normal(x0.shape[1:], draws)


def apply(
    trainer: Trainer, net: nn.Module, optimizer: torch.optim.Optimizer, figures: Tensor, exit_at: int | None
) -> Update:
    """Clip, refuse what is not finite, step. The figures of all ranks are read here: the one wait of an update.

    It ends when the figures are there, while the GPU still has the step before it: the GPU waits for nobody.
    """
    norm = clip(net, optimizer, trainer.config.grad_clip)
    shown = torch.cat([of_all_ranks(figures), norm.expand(1, len(figures))])
    here, copied = copy_async(shown, torch.device("cpu")), record_event(trainer.ranks.device)
    with trainer.clock("update"):
        taken = step_if(optimizer, shown[:, 0].sum().isfinite())
    if copied is not None:
        copied.synchronize()
    *rows, (grad_norm, *_) = here.tolist()
    loss, *looks = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    if not math.isfinite(loss + grad_norm):
        bad = [rank for rank, row in enumerate(rows) if not math.isfinite(row[0])]
        where = f"on rank {', '.join(map(str, bad))}" if bad else "on no rank, but its gradient is not finite"
        raise DivergedError(f"loss {loss:g}, gradient norm {grad_norm:g}; the loss is not finite {where}")
    with trainer.clock("update"):
        if not taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Update(loss, grad_norm, exit_at, tuple(looks))
