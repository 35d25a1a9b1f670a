"""Rollouts used more than once: while the student stands still, one trajectory serves several critic updates.

Between two student updates the critic takes n micro-batches. They are dealt into groups of at least len(ladder); a
group has one trajectory, whose x0 of every ladder step is a sample, and where a group is larger some x0 are taken
again, at another score time. Which micro-batch takes which step depends on the seed, the iteration and the number of
micro-batches alone. Shapes: B batch, C channels, T latent frames, H W latent size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.condition import Condition, Denoiser
from common.seed import draw_normal, make_generator
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.rollout import trajectory
from stage2_distill.dmd.schedule import MicroBatch, accumulation_steps


@dataclass(frozen=True)
class RolloutSlot:
    """The place of one micro-batch of the critic."""

    group: int  # number of the trajectory since the student's update
    exit_index: int
    starts_group: bool  # of its group


def assign_slot(micro_batch: MicroBatch, config: DistillConfig, world: int) -> RolloutSlot:
    """The slot of a critic's micro-batch; the same on all ranks."""
    count = accumulation_steps(config, world)
    cycle, iteration_in_cycle = divmod(micro_batch.iteration, config.student_update_interval)
    index = iteration_in_cycle * count + micro_batch.samples[0] // (world * config.batch_size)
    slot_count, step_count = config.student_update_interval * count, len(config.timesteps)
    groups = max(1, slot_count // step_count)
    small_size, large_groups = divmod(slot_count, groups)  # sizes: `larger` groups of small + 1, then groups of small
    large_slots = large_groups * (small_size + 1)
    in_larger = index < large_slots
    size = small_size + 1 if in_larger else small_size
    group, member = divmod(index, size) if in_larger else divmod(index - large_slots, size)
    group += 0 if in_larger else large_groups
    draw = make_generator(config.seed, cycle, group, "critic exits")
    return RolloutSlot(group, draw_group_exits(size, step_count, draw)[member], member == 0)


def draw_group_exits(size: int, step_count: int, rng: torch.Generator) -> list[int]:
    """Ladder steps of a group's members: each step once, in order, then some again; or some of them, in order."""
    if size < step_count:
        return sorted(torch.randperm(step_count, generator=rng)[:size].tolist())
    repeats = [int(step) for _ in range(size // step_count) for step in torch.randperm(step_count, generator=rng)]
    return [*range(step_count), *repeats[: size - step_count]]


@dataclass
class RolloutReuse:
    """The present trajectory. Its state is remade by taking the micro-batches since the student's update again."""

    config: DistillConfig
    world: int
    condition: Condition | None = None
    remaining_steps: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    computed_steps: list[Tensor] = field(default_factory=list)  # x0 (B C T H W) of the ladder's steps so far
    exits_taken: set[int] = field(
        default_factory=set
    )  # ladder steps of an update's samples; whoever reads it clears it

    def sample(self, student: Denoiser, micro_batch: MicroBatch, condition: Condition) -> tuple[Tensor, Condition, int]:
        """x0 (B C T H W) for a critic's micro-batch, what it was made from, and its ladder step."""
        slot = assign_slot(micro_batch, self.config, self.world)
        if slot.starts_group or self.condition is None:
            self.start_trajectory(student, micro_batch, condition)
        while len(self.computed_steps) <= slot.exit_index:
            self.computed_steps.append(next(self.remaining_steps))
        assert self.condition is not None
        self.exits_taken.add(slot.exit_index)
        return self.computed_steps[slot.exit_index], self.condition, slot.exit_index

    def start_trajectory(self, student: Denoiser, micro_batch: MicroBatch, condition: Condition) -> None:
        """Start a trajectory from the noise of its first micro-batch."""
        device = condition.text.device
        generators = [
            make_generator(self.config.seed, micro_batch.iteration, s, "critic rollout", device)
            for s in micro_batch.samples
        ]
        noise = draw_normal(self.config.spec.latent_shape, generators)
        self.condition, self.computed_steps = condition, []
        self.remaining_steps = trajectory(student, noise, condition, sigmas=self.config.sigmas, generators=generators)
