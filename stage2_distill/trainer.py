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
from stage2_distill.distributed.fsdp import set_gradient_all_reduce
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks
from stage2_distill.dmd.latent_stats import LATENT_STATS, latent_stats
from stage2_distill.dmd.losses import critic_loss, dmd_loss
from stage2_distill.dmd.rollout import rollout
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import (
    CRITIC,
    STUDENT,
    MicroBatch,
    draw_exit_index,
    learning_rate,
    score_bounds,
    student_turn,
)
from stage2_distill.model.wan import guided, make_denoiser
from stage2_distill.monitoring.metrics_log import StepResult, UpdateResult
from stage2_distill.optim.ema import EmaWeights
from stage2_distill.optim.optimizers import clip_gradients, master_weights, set_learning_rate, step_if_finite

LossFunction = Callable[[Tensor, Condition, Tensor, Tensor], Tensor]  # (x0, condition, sigma, eps) -> scalar


class DivergedError(RuntimeError):
    """A loss or gradient is not finite; the message names the iteration and the last good checkpoint."""


@dataclass(frozen=True)
class RoleNetworks:
    """The three networks, all started from the same weights."""

    student: nn.Module
    teacher: nn.Module
    critic: nn.Module


@dataclass(frozen=True)
class Trainer:
    """All that an iteration needs besides its data."""

    config: DistillConfig
    ranks: RankContext
    roles: RoleNetworks
    student_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    ema: EmaWeights
    negative_text: Tensor  # (L D)
    timer: PhaseTimer
    rollout_reuse: RolloutReuse

    def role_denoiser(self, net: nn.Module) -> Denoiser:
        """A role as a function to x0."""
        return make_denoiser(net, getattr(torch, self.config.dtype))


def train_step(trainer: Trainer, iteration: int, data: Iterator[tuple[MicroBatch, Condition]]) -> StepResult:
    """One iteration of DMD2, algorithm 1: now and then the student, always the critic."""
    student = None
    if student_turn(iteration, trainer.config):
        student = update_student(trainer, iteration, data)
        student_masters = master_weights(trainer.roles.student, trainer.student_optimizer)
        trainer.ema.update(student_masters, ema_decay(iteration, trainer.config), trainer.ranks.device)
    critic = update_critic(trainer, iteration, data)
    return StepResult(student, critic, trainer.timer.read_seconds())


def ema_decay(iteration: int, config: DistillConfig) -> float:
    """Decay after a student update: 0, a plain copy, up to iteration `ema_start`."""
    return config.ema_decay if iteration > config.ema_start else 0.0


def update_student(trainer: Trainer, iteration: int, data: Iterator[tuple[MicroBatch, Condition]]) -> UpdateResult:
    """Move the student's law towards the teacher's (DMD eq. 7), with a gradient at one step of the rollout."""
    critic = trainer.role_denoiser(trainer.roles.critic)
    teacher = guided(
        trainer.role_denoiser(trainer.roles.teacher),
        negative_text=trainer.negative_text,
        scale=trainer.config.guidance_scale,
    )

    def compute_loss(x0: Tensor, condition: Condition, sigma: Tensor, eps: Tensor) -> Tensor:
        return dmd_loss(x0, condition, teacher=teacher, critic=critic, sigma=sigma, eps=eps)

    exit_index = draw_exit_index(iteration, STUDENT, trainer.config)
    value = accumulate_gradients(trainer, data, compute_loss, net=trainer.roles.student, exit_index=exit_index)
    trainer.ema.prepare_update(ema_decay(iteration, trainer.config))
    set_learning_rate(trainer.student_optimizer, learning_rate(iteration, STUDENT, trainer.config))
    return apply_update(trainer, trainer.roles.student, trainer.student_optimizer, value, exit_index)


def update_critic(trainer: Trainer, iteration: int, data: Iterator[tuple[MicroBatch, Condition]]) -> UpdateResult:
    """Teach the critic the student's present law (DMD2 section 4.2), on a rollout without gradient."""
    critic = trainer.role_denoiser(trainer.roles.critic)

    def compute_loss(x0: Tensor, condition: Condition, sigma: Tensor, eps: Tensor) -> Tensor:
        return critic_loss(x0, condition, critic=critic, sigma=sigma, eps=eps, kind=trainer.config.critic_loss)

    exit_at = draw_exit_index(iteration, CRITIC, trainer.config)
    value = accumulate_gradients(trainer, data, compute_loss, net=trainer.roles.critic, exit_index=exit_at)
    exits = trainer.rollout_reuse.exits_taken or {exit_at}
    exit_index = exits.pop() if len(exits) == 1 else None
    trainer.rollout_reuse.exits_taken.clear()
    set_learning_rate(trainer.critic_optimizer, learning_rate(iteration, CRITIC, trainer.config))
    return apply_update(trainer, trainer.roles.critic, trainer.critic_optimizer, value, exit_index)


def accumulate_gradients(
    trainer: Trainer,
    data: Iterator[tuple[MicroBatch, Condition]],
    loss: LossFunction,
    *,
    net: nn.Module,
    exit_index: int,
) -> Tensor:
    """Add up the gradients of `net` over the micro-batches of one update; this rank's mean loss and looks (4)."""
    total = torch.zeros(1 + len(LATENT_STATS), device=trainer.ranks.device)
    for micro_batch, condition in trainer.timer.time_items(data, "data"):
        set_gradient_all_reduce(net, micro_batch.last)
        with trainer.timer("rollout"), torch.set_grad_enabled(micro_batch.role == STUDENT):
            x0, condition, exit_index = simulate_rollout(trainer, micro_batch, condition, exit_index)
        with trainer.timer("scores"):
            sigma, eps = draw_score_noise(trainer, micro_batch, x0, exit_index)
            value = loss(x0, condition, sigma, eps)
        with trainer.timer("backward"):
            (value * micro_batch.share).backward()
        total += torch.cat([value.detach()[None], latent_stats(x0, condition)]) * micro_batch.share
        if micro_batch.last:
            break
    return total


def simulate_rollout(
    trainer: Trainer, micro_batch: MicroBatch, condition: Condition, exit_index: int
) -> tuple[Tensor, Condition, int]:
    """The student's x0 (B C T H W) for one micro-batch, from pure noise down to ladder step `exit_index`.

    And what it was made from, and its step: other ones where a rollout is used again.
    """
    config = trainer.config
    if micro_batch.role == CRITIC and config.rollout_reuse:
        return trainer.rollout_reuse.sample(trainer.role_denoiser(trainer.roles.student), micro_batch, condition)
    generators = [
        make_generator(config.seed, micro_batch.iteration, sample, f"{micro_batch.role} rollout", trainer.ranks.device)
        for sample in micro_batch.samples
    ]
    x0 = rollout(
        trainer.role_denoiser(trainer.roles.student),
        draw_normal(config.spec.latent_shape, generators),
        condition,
        sigmas=config.sigmas,
        generators=generators,
        exit_index=exit_index,
    )
    return x0, condition, exit_index


def draw_score_noise(trainer: Trainer, micro_batch: MicroBatch, x0: Tensor, exit_index: int) -> tuple[Tensor, Tensor]:
    """Where the scores are compared: sigma (B) and noise (B C T H W)."""
    config = trainer.config
    generators = [
        make_generator(config.seed, micro_batch.iteration, sample, f"{micro_batch.role} score", trainer.ranks.device)
        for sample in micro_batch.samples
    ]
    low, high = score_bounds(exit_index, config)
    u = low + (high - low) * draw_uniform(generators)
    sigma = score_sigma(u, s=config.shift, low=config.score_low, high=config.score_high)
    return sigma, draw_normal(x0.shape[1:], generators)


def apply_update(
    trainer: Trainer, net: nn.Module, optimizer: torch.optim.Optimizer, loss_and_stats: Tensor, exit_index: int | None
) -> UpdateResult:
    """Clip, refuse what is not finite, step. The figures of all ranks are read here: the one wait of an update.

    It ends when the figures are there, while the GPU still has the step before it: the GPU waits for nobody.
    """
    norm = clip_gradients(net, optimizer, trainer.config.grad_clip)
    all_stats = torch.cat([gather_from_ranks(loss_and_stats), norm.expand(1, len(loss_and_stats))])
    host_stats, copy_event = copy_async(all_stats, torch.device("cpu")), record_event(trainer.ranks.device)
    with trainer.timer("update"):
        stepped = step_if_finite(optimizer, all_stats[:, 0].sum().isfinite())
    if copy_event is not None:
        copy_event.synchronize()
    *rows, (grad_norm, *_) = host_stats.tolist()
    loss, *latent_stats = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    if not math.isfinite(loss + grad_norm):
        bad_ranks = [rank for rank, row in enumerate(rows) if not math.isfinite(row[0])]
        location = (
            f"on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "on no rank, but its gradient is not finite"
        )
        raise DivergedError(f"loss {loss:g}, gradient norm {grad_norm:g}; the loss is not finite {location}")
    with trainer.timer("update"):
        if not stepped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return UpdateResult(loss, grad_norm, exit_index, tuple(latent_stats))
