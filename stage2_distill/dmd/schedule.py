"""What happens in which iteration, on which samples: pure functions of the configuration, the same on all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.seed import make_generator
from stage2_distill.config import DistillConfig

STUDENT, CRITIC = "student", "critic"


@dataclass(frozen=True)
class MicroBatch:
    """One rank's micro-batch of one update."""

    iteration: int
    role: str  # STUDENT or CRITIC
    samples: tuple[int, ...]  # places in the global batch
    positions: tuple[int, ...]  # places in the endless stream of records
    share: float  # of the rank's gradient
    last: bool  # of the update


def student_turn(iteration: int, config: DistillConfig) -> bool:
    """Whether the student is updated in this iteration, before the critic."""
    return iteration >= config.critic_warmup and iteration % config.student_update_interval == 0


def first_role(iteration: int, config: DistillConfig) -> str:
    """The role that is updated first in an iteration."""
    return STUDENT if student_turn(iteration, config) else CRITIC


def updates_of(role: str, iteration: int, config: DistillConfig) -> int:
    """Number of updates of a role in iterations 0..iteration-1."""

    def student_turns(end: int) -> int:
        return -(-end // config.student_update_interval)

    return iteration if role == CRITIC else max(0, student_turns(iteration) - student_turns(config.critic_warmup))


def updates_before(iteration: int, config: DistillConfig) -> int:
    """Number of updates of either role in iterations 0..iteration-1: the stream's position in global batches."""
    return sum(updates_of(role, iteration, config) for role in (STUDENT, CRITIC))


def learning_rate(iteration: int, role: str, config: DistillConfig) -> float:
    """Rises evenly over the role's first `warmup` updates and falls over the last `cooldown` iterations."""
    full = config.student_lr if role == STUDENT else config.critic_lr
    rise = (updates_of(role, iteration, config) + 1) / max(1, config.lr_warmup)
    fall = (config.iterations - iteration) / config.lr_cooldown if config.lr_cooldown else 1.0
    return full * min(1.0, rise, fall)


def stream_position(iteration: int, config: DistillConfig) -> int:
    """Place in the endless stream of records at which an iteration begins."""
    return updates_before(iteration, config) * config.global_batch


def accumulation_steps(config: DistillConfig, world: int) -> int:
    """Micro-batches a rank takes for one update; ValueError where `global_batch` cannot be reached."""
    step_size = config.batch_size * world
    if config.global_batch % step_size:
        low = max(1, config.global_batch // step_size) * step_size
        raise ValueError(
            f"global_batch={config.global_batch}: not a multiple of batch_size {config.batch_size} x {world} ranks; "
            f"nearest are {low} and {low + step_size}"
        )
    return config.global_batch // step_size


def micro_batches(config: DistillConfig, *, start: int, rank: int, world: int) -> Iterator[MicroBatch]:
    """All micro-batches of one rank from iteration `start` to the end, in order."""
    count = accumulation_steps(config, world)
    for iteration in range(start, config.iterations):
        update = updates_before(iteration, config)
        roles = (STUDENT, CRITIC) if student_turn(iteration, config) else (CRITIC,)
        for role_index, role in enumerate(roles):
            for step in range(count):
                first = (step * world + rank) * config.batch_size
                samples = tuple(range(first, first + config.batch_size))
                offset = (update + role_index) * config.global_batch
                positions = tuple(offset + sample for sample in samples)
                yield MicroBatch(iteration, role, samples, positions, 1 / count, step == count - 1)


def draw_exit_index(iteration: int, role: str, config: DistillConfig) -> int:
    """The ladder step at which this update leaves the rollout, uniform (DMD2 section 4.5).

    Stratified: of every len(ladder) updates of the role each takes another step, in an order drawn anew.
    """
    steps = len(config.timesteps)
    if config.exit_schedule == "stratified":
        window, offset = divmod(updates_of(role, iteration, config), steps)
        draw = make_generator(config.seed, window, 0, f"{role} exits")
        return int(torch.randperm(steps, generator=draw)[offset])
    draw = make_generator(config.seed, iteration, 0, f"{role} exit")
    return int(torch.randint(steps, (1,), generator=draw))


def score_bounds(exit_index: int, config: DistillConfig) -> tuple[float, float]:
    """Bounds of u, the score time before the shift, for a rollout that left at step `exit_index`."""
    next_timestep = config.timesteps[exit_index + 1] if exit_index + 1 < len(config.timesteps) else 0.0
    low = next_timestep / 1000 if config.ts_schedule else 0.0
    high = config.timesteps[exit_index] / 1000 if config.ts_schedule_max else 1.0
    return low, high
