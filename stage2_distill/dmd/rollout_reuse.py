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
from stage2_distill.dmd.schedule import Part, accumulation


@dataclass(frozen=True)
class Slot:
    """The place of one micro-batch of the critic."""

    group: int  # number of the trajectory since the student's update
    exit_index: int
    first: bool  # of its group


def slot_of(part: Part, config: DistillConfig, world: int) -> Slot:
    """The slot of a critic's micro-batch; the same on all ranks."""
    count = accumulation(config, world)
    cycle, into = divmod(part.iteration, config.student_every)
    place = into * count + part.samples[0] // (world * config.batch_size)
    slots, steps = config.student_every * count, len(config.ladder)
    groups = max(1, slots // steps)
    small, larger = divmod(slots, groups)  # sizes: `larger` groups of small + 1, then groups of small
    cut = larger * (small + 1)
    in_larger = place < cut
    size = small + 1 if in_larger else small
    group, member = divmod(place, size) if in_larger else divmod(place - cut, size)
    group += 0 if in_larger else larger
    draw = make_generator(config.seed, cycle, group, "critic exits")
    return Slot(group, exits(size, steps, draw)[member], member == 0)


def exits(size: int, steps: int, draw: torch.Generator) -> list[int]:
    """Ladder steps of a group's members: each step once, in order, then some again; or some of them, in order."""
    if size < steps:
        return sorted(torch.randperm(steps, generator=draw)[:size].tolist())
    again = [int(step) for _ in range(size // steps) for step in torch.randperm(steps, generator=draw)]
    return [*range(steps), *again[: size - steps]]


@dataclass
class Reuse:
    """The present trajectory. Its state is remade by taking the micro-batches since the student's update again."""

    config: DistillConfig
    world: int
    condition: Condition | None = None
    coming: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    seen: list[Tensor] = field(default_factory=list)  # x0 (B C T H W) of the ladder's steps so far
    taken: set[int] = field(default_factory=set)  # ladder steps of an update's samples; whoever reads it clears it

    def sample(self, student: Denoiser, part: Part, condition: Condition) -> tuple[Tensor, Condition, int]:
        """x0 (B C T H W) for a critic's micro-batch, what it was made from, and its ladder step."""
        slot = slot_of(part, self.config, self.world)
        if slot.first or self.condition is None:
            self.begin(student, part, condition)
        while len(self.seen) <= slot.exit_index:
            self.seen.append(next(self.coming))
        assert self.condition is not None
        self.taken.add(slot.exit_index)
        return self.seen[slot.exit_index], self.condition, slot.exit_index

    def begin(self, student: Denoiser, part: Part, condition: Condition) -> None:
        """Start a trajectory from the noise of its first micro-batch."""
        device = condition.text.device
        draws = [make_generator(self.config.seed, part.iteration, s, "critic rollout", device) for s in part.samples]
        noise = draw_normal(self.config.spec.latent_shape, draws)
        self.condition, self.seen = condition, []
        self.coming = trajectory(student, noise, condition, ladder=self.config.sigmas, generators=draws)
