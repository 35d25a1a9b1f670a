"""What happens in which iteration, on which samples: pure functions of the options, equal on all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.seed import make_generator
from common.video import VideoSpec
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.video_shapes import SampleShapes, pack_samples

STUDENT, CRITIC = "student", "critic"


@dataclass(frozen=True)
class MicroBatch:
    """One rank's micro-batch of one update."""

    iteration: int
    role: str  # STUDENT or CRITIC
    samples: tuple[int, ...]  # indices within the global batch
    positions: tuple[int, ...]  # indices in the endless stream of records
    share: float  # of the rank's gradient: every sample of the update counts the same
    last: bool  # of the update
    spec: VideoSpec  # shape of its videos
    step: int  # among the rank's micro-batches of the update

    def sample_keys(self, seed: int) -> list[tuple[int, int, int]]:
        """(seed, iteration, sample) of each sample: what its random draws depend on, besides their purpose."""
        return [(seed, self.iteration, sample) for sample in self.samples]


@dataclass(frozen=True)
class Schedule:
    """The options that say when each role is updated, and how; `world` is the number of ranks."""

    world: int
    iterations: int
    student_update_interval: int
    teacher_warmup: int
    critic_warmup: int
    batch_size: int
    global_batch: int
    seed: int
    timesteps: tuple[float, ...]
    exit_schedule: str
    student_lr: float
    critic_lr: float
    lr_warmup: int
    lr_cooldown: int
    ema_decay: float
    ema_start: int

    @classmethod
    def of(cls, config: DistillConfig, world: int) -> "Schedule":
        """The schedule of a run on `world` ranks; ValueError if `global_batch` cannot be reached with them."""
        _ = config.accumulation_steps(world)
        return config.select(cls, world=world)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that a rank takes for one update, more if the samples of a shape do not fill theirs."""
        return self.global_batch // (self.batch_size * self.world)

    def is_student_turn(self, iteration: int) -> bool:
        """Whether the student is updated in this iteration, before the critic."""
        is_match = iteration >= self.matching_start and iteration % self.student_update_interval == 0
        return is_match or self.is_teacher_warmup(iteration)

    @property
    def matching_start(self) -> int:
        """The iteration from which the student may be updated by matching."""
        return self.teacher_warmup + self.critic_warmup

    def is_teacher_warmup(self, iteration: int) -> bool:
        """Whether only the student is updated, by regression to the teacher (regression.py)."""
        return iteration < self.teacher_warmup

    def updated_roles(self, iteration: int) -> tuple[str, ...]:
        """The roles that are updated in an iteration, in order."""
        if self.is_teacher_warmup(iteration):
            return (STUDENT,)
        return (STUDENT, CRITIC) if self.is_student_turn(iteration) else (CRITIC,)

    def updates_of(self, role: str, iteration: int) -> int:
        """Number of updates of a role in iterations 0..iteration-1."""
        if role == CRITIC:
            return max(0, iteration - self.teacher_warmup)
        # -(-a // b) rounds up: iterations 0, interval, 2 interval, ... below the end
        turns, early_turns = (-(-end // self.student_update_interval) for end in (iteration, self.matching_start))
        return min(iteration, self.teacher_warmup) + max(0, turns - early_turns)

    def updates_before(self, iteration: int) -> int:
        """Number of updates of both roles in iterations 0..iteration-1: the stream's position in global batches."""
        return sum(self.updates_of(role, iteration) for role in (STUDENT, CRITIC))

    def stream_position(self, iteration: int) -> int:
        """Index in the endless stream of records at which an iteration begins."""
        return self.updates_before(iteration) * self.global_batch

    def learning_rate(self, iteration: int, role: str) -> float:
        """Rises linearly over the role's first `lr_warmup` updates and falls over the last `lr_cooldown` iterations."""
        full = self.student_lr if role == STUDENT else self.critic_lr
        # + 1: the first update already has a rate above 0
        rise = (self.updates_of(role, iteration) + 1) / max(1, self.lr_warmup)
        fall = (self.iterations - iteration) / self.lr_cooldown if self.lr_cooldown else 1.0
        return full * min(1.0, rise, fall)

    def ema_decay_after(self, iteration: int) -> float:
        """Decay of the average after a student update; up to iteration `ema_start` 0, which copies the student."""
        return self.ema_decay if iteration > self.ema_start else 0.0

    def micro_batches(self, *, start: int, rank: int, shapes: SampleShapes) -> Iterator[MicroBatch]:
        """All micro-batches of one rank from iteration `start` to the end, in order."""
        for iteration in range(start, self.iterations):
            offset = self.stream_position(iteration)
            for role in self.updated_roles(iteration):
                yield from self.split_update(iteration, role, offset=offset, rank=rank, shapes=shapes)
                offset += self.global_batch

    def split_update(
        self, iteration: int, role: str, *, offset: int, rank: int, shapes: SampleShapes
    ) -> Iterator[MicroBatch]:
        """One rank's micro-batches of the update that reads the stream from `offset` on."""
        count = self.global_batch
        specs = [shapes.sample_spec(iteration, role, sample, offset + sample) for sample in range(count)]
        packed = pack_samples(specs, batch_size=self.batch_size, world=self.world)
        own = packed[rank :: self.world]  # ranks take turns: any world, same samples
        for step, samples in enumerate(own):
            positions = tuple(offset + sample for sample in samples)
            share = len(samples) * self.world / count  # the mean over ranks is that over samples
            yield MicroBatch(iteration, role, samples, positions, share, step == len(own) - 1, specs[samples[0]], step)

    def draw_exit_index(self, iteration: int, role: str) -> int:
        """The index of the timestep at which this update leaves the rollout, uniform (DMD2, section 4.5).

        Stratified: of every len(timesteps) updates of the role each takes another step, in an order drawn again.
        """
        steps = len(self.timesteps)
        if self.exit_schedule == "stratified":
            window, offset = divmod(self.updates_of(role, iteration), steps)
            rng = make_generator(self.seed, window, 0, f"{role} exits")
            return int(torch.randperm(steps, generator=rng)[offset])
        rng = make_generator(self.seed, iteration, 0, f"{role} exit")
        return int(torch.randint(steps, (1,), generator=rng))
