"""Rollouts used more than once: while the student does not change, one trajectory serves several critic updates.

Between two student updates the critic takes n micro-batches. They are dealt into groups of at least len(timesteps).
A group shares one trajectory, and the x0 of each of its steps is a sample; in a larger group some x0 are used again, at
another score time. Which micro-batch uses which step depends only on the seed, the iteration and the number of
micro-batches. Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from common.condition import Condition
from common.seed import make_generator
from stage2_distill.dmd.rollout import Simulated, StudentRollouts
from stage2_distill.dmd.schedule import MicroBatch, Schedule


@dataclass(frozen=True)
class RolloutSlot:
    """Which step of which trajectory a micro-batch of the critic uses."""

    group: int  # number of the trajectory since the student's update
    exit_index: int
    starts_group: bool


def assign_slot(micro_batch: MicroBatch, schedule: Schedule) -> RolloutSlot:
    """The slot of a micro-batch of the critic; equal on all ranks."""
    count = schedule.accumulation_steps
    cycle, iteration_in_cycle = divmod(micro_batch.iteration, schedule.student_update_interval)
    slots, steps = schedule.student_update_interval * count, len(schedule.timesteps)
    groups = max(1, slots // steps)
    sizes = [slots // groups + (group < slots % groups) for group in range(groups)]  # the first ones are larger by one
    starts = [0, *accumulate(sizes)]
    index = iteration_in_cycle * count + micro_batch.step  # among the critic's micro-batches of this cycle
    group = bisect_right(starts, index) - 1
    member = index - starts[group]
    rng = make_generator(schedule.seed, cycle, group, "critic exits")
    return RolloutSlot(group, draw_group_exits(sizes[group], steps, rng)[member], member == 0)


def draw_group_exits(size: int, step_count: int, rng: torch.Generator) -> list[int]:
    """Steps of a group's members: all in order, then some of them again; in a small group some of them, in order."""
    if size < step_count:
        return sorted(torch.randperm(step_count, generator=rng)[:size].tolist())
    repeats = [int(step) for _ in range(size // step_count) for step in torch.randperm(step_count, generator=rng)]
    return [*range(step_count), *repeats[: size - step_count]]


@dataclass
class RolloutReuse:
    """The current trajectory of the student, which serves the critic.

    A resumed run rebuilds this state by simulating the micro-batches since the student's update again.
    """

    rollouts: StudentRollouts
    schedule: Schedule
    condition: Condition | None = None
    remaining_steps: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    computed_steps: list[Tensor] = field(default_factory=list)  # x0 (B C T H W) of the steps computed so far

    def simulate(self, micro_batch: MicroBatch, condition: Condition, exit_index: int) -> Simulated:
        """Samples for a micro-batch; `condition` is used if it starts a trajectory, `exit_index` is replaced."""
        slot = assign_slot(micro_batch, self.schedule)
        if slot.starts_group or self.condition is None:
            self.condition, self.computed_steps = condition, []
            self.remaining_steps = self.rollouts.start_trajectory(micro_batch, condition)
        while len(self.computed_steps) <= slot.exit_index:  # steps are computed when first used
            self.computed_steps.append(next(self.remaining_steps))
        return Simulated(self.computed_steps[slot.exit_index], self.condition, slot.exit_index)
