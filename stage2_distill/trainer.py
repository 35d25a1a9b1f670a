"""Distribution Matching Distillation: the roles, and one iteration.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.condition import Condition, Denoiser
from common.device import copy_async, record_event
from common.timer import PhaseTimer
from stage2_distill.distributed.fsdp import set_gradient_all_reduce
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks
from stage2_distill.dmd.latent_stats import LATENT_STATS, latent_stats
from stage2_distill.dmd.losses import critic_loss
from stage2_distill.dmd.rollout import Simulated, StudentRollouts
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch, Schedule
from stage2_distill.dmd.score_noise import ScoreNoise
from stage2_distill.dmd.student_objective import LossPair, StudentObjective
from stage2_distill.model.weight_loading import blend_weights
from stage2_distill.monitoring.metrics_log import StepResult, UpdateResult
from stage2_distill.optim.adamw import RoleOptimizer
from stage2_distill.optim.ema import CriticAverage, EmaWeights

MicroBatches = Iterator[tuple[MicroBatch, Condition]]
LossFunction = Callable[[Simulated, MicroBatch], LossPair]


class DivergedError(RuntimeError):
    """A loss or gradient is not finite; the message names the ranks."""


@dataclass(frozen=True)
class TrainedRole:
    """A network that is trained."""

    name: str  # STUDENT or CRITIC
    net: nn.Module
    optimizer: RoleOptimizer
    denoiser: Denoiser  # of `net`


@dataclass(frozen=True)
class Roles:
    """The networks, all started from the same weights, and everything that training changes."""

    form: str  # STANDARD or COMPACT: how the trained ones are stored
    student: TrainedRole
    critic: TrainedRole
    teacher: nn.Module
    teacher_denoiser: Denoiser  # without guidance
    ema: EmaWeights  # of the student
    critic_average: CriticAverage | None = None

    @property
    def fake_denoiser(self) -> Denoiser:
        """What stands for the score of the student's distribution: the critic, or its average."""
        return self.critic.denoiser if self.critic_average is None else self.critic_average.denoiser


@dataclass(frozen=True)
class Accumulated:
    """Results of the micro-batches of one update on this rank."""

    stats: Tensor  # (4) on the device: mean loss and LATENT_STATS
    exit_index: int | None  # of all their rollouts; None if they differ


@dataclass(frozen=True)
class GradientAccumulator:
    """Generates the student's samples and adds up a loss's gradients over the micro-batches of an update."""

    student_rollouts: StudentRollouts
    critic_rollouts: StudentRollouts | RolloutReuse
    device: torch.device
    timer: PhaseTimer

    def accumulate(self, data: MicroBatches, loss: LossFunction, net: nn.Module, exit_index: int) -> Accumulated:
        """Take the micro-batches of one update from `data`; the gradients are those of `net`."""
        total = torch.zeros(1 + len(LATENT_STATS), device=self.device)
        exits: set[int] = set()
        for micro_batch, condition in data:
            trains_student = micro_batch.role == STUDENT
            rollouts = self.student_rollouts if trains_student else self.critic_rollouts
            set_gradient_all_reduce(net, micro_batch.last)  # HSDP averages its replicas in the last pass only
            with self.timer("rollout"), torch.set_grad_enabled(trains_student):
                samples = rollouts.simulate(micro_batch, condition, exit_index)
            with self.timer("scores"):
                value, reported = loss(samples, micro_batch)
            with self.timer("backward"):
                (value * micro_batch.share).backward()  # the shares of an update add up to 1
            stats = torch.cat([reported.detach()[None], latent_stats(samples.x0, samples.condition)])
            total += stats * micro_batch.share
            exits.add(samples.exit_index)
            if micro_batch.last:
                break
        return Accumulated(total, exits.pop() if len(exits) == 1 else None)


@dataclass(frozen=True)
class PendingStats:
    """Results of an update on all ranks, on their way to the host."""

    finite: Tensor  # boolean on the device
    host_rows: Tensor  # (ranks + 1, 4): each rank's loss and LATENT_STATS, then the gradient norm
    arrival: torch.cuda.Event | None

    @classmethod
    def gather(cls, stats: Tensor, grad_norm: Tensor) -> "PendingStats":
        """Gather the ranks' stats (4) and start the copy to the host."""
        rows = torch.cat([gather_from_ranks(stats), grad_norm.expand(1, len(stats))])
        # the event precedes the step, so that reading does not wait for it
        host_rows, arrival = copy_async(rows, torch.device("cpu")), record_event(stats.device)
        return cls(rows[:, 0].sum().isfinite(), host_rows, arrival)

    def read(self) -> tuple[float, float, tuple[float, ...]]:
        """Wait for mean loss, gradient norm and mean LATENT_STATS; DivergedError if the first two are not finite."""
        if self.arrival is not None:
            self.arrival.synchronize()
        *ranks, (grad_norm, *_) = self.host_rows.tolist()
        loss, *stats = (sum(column) / len(ranks) for column in zip(*ranks, strict=True))
        if not math.isfinite(loss + grad_norm):
            bad_ranks = [str(rank) for rank, row in enumerate(ranks) if not math.isfinite(row[0])]
            location = f"on rank {', '.join(bad_ranks)}" if bad_ranks else "on no rank, but its gradient is not finite"
            raise DivergedError(f"loss {loss:g}, gradient norm {grad_norm:g}; the loss is not finite {location}")
        return loss, grad_norm, tuple(stats)


@dataclass(frozen=True)
class Trainer:
    """All that an iteration needs besides its data."""

    ranks: RankContext
    roles: Roles
    objective: StudentObjective
    score_noise: ScoreNoise  # at which the critic is trained
    schedule: Schedule
    accumulator: GradientAccumulator
    critic_loss: str  # what the critic regresses
    grad_clip: float
    ida_share: float
    timer: PhaseTimer


def train_step(trainer: Trainer, iteration: int, data: MicroBatches) -> StepResult:
    """One iteration of DMD2 (algorithm 1): the student in its turn, then the critic."""
    roles = trainer.schedule.updated_roles(iteration)
    student = update_student(trainer, iteration, data) if STUDENT in roles else None
    critic = update_critic(trainer, iteration, data) if CRITIC in roles else None
    return StepResult(student, critic, trainer.timer.read_seconds())


def update_student(trainer: Trainer, iteration: int, data: MicroBatches) -> UpdateResult:
    """Move the student's distribution to the teacher's (DMD, eq. 7), with a gradient at one step of the rollout."""
    roles, schedule, objective = trainer.roles, trainer.schedule, trainer.objective
    loss = objective.warmup_loss if schedule.is_teacher_warmup(iteration) else objective.matching_loss
    exit_index = schedule.draw_exit_index(iteration, STUDENT)
    accumulated = trainer.accumulator.accumulate(data, loss, roles.student.net, exit_index)
    with roles.ema.update_after(schedule.ema_decay_after(iteration)):
        result = apply_update(trainer, roles.student.optimizer, schedule.learning_rate(iteration, STUDENT), accumulated)
    if trainer.ida_share and not schedule.is_teacher_warmup(iteration):
        align_critic(roles, trainer.ida_share)
    return result


def align_critic(roles: Roles, share: float) -> None:
    """Set critic = (1 - share) critic + share student, as the student has just moved on (IDA, arXiv 2506.00523).

    What is mixed are the master weights; of adapters their factors, which start equal for that reason.
    """
    critic = roles.critic
    student_masters = roles.student.optimizer.master_weights()
    blend_weights(student_masters, dict(critic.net.named_parameters()), critic.optimizer.remainders(), share)


def update_critic(trainer: Trainer, iteration: int, data: MicroBatches) -> UpdateResult:
    """Fit the critic to the student's present distribution (DMD2, section 4.2), on rollouts without gradient."""
    critic, schedule = trainer.roles.critic, trainer.schedule

    def loss(samples: Simulated, micro_batch: MicroBatch) -> LossPair:
        sigma, eps = trainer.score_noise.draw(micro_batch, samples)
        network, kind = critic.denoiser, trainer.critic_loss
        value = critic_loss(samples.x0, samples.condition, critic=network, sigma=sigma, eps=eps, kind=kind)
        return value, value

    exit_index = schedule.draw_exit_index(iteration, CRITIC)
    accumulated = trainer.accumulator.accumulate(data, loss, critic.net, exit_index)
    result = apply_update(trainer, critic.optimizer, schedule.learning_rate(iteration, CRITIC), accumulated)
    if trainer.roles.critic_average is not None:
        trainer.roles.critic_average.update()
    return result


def apply_update(trainer: Trainer, optimizer: RoleOptimizer, lr: float, accumulated: Accumulated) -> UpdateResult:
    """Clip, step and read the results of all ranks; DivergedError, without a step, if they are not finite.

    Reading them is the only wait of an update on the host. It ends when they have arrived, while the GPU still has the
    step queued before it, so that the GPU never waits for the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    pending = PendingStats.gather(accumulated.stats, optimizer.clip_gradients(trainer.grad_clip))
    with trainer.timer("update"):
        stepped = optimizer.step_if_finite(pending.finite)
    loss, grad_norm, stats = pending.read()
    with trainer.timer("update"):
        if not stepped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return UpdateResult(loss, grad_norm, accumulated.exit_index, stats)
