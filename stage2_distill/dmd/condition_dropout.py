"""Random dropout and time jitter of the first-frame condition: a pure function of seed, iteration and sample."""

from dataclasses import dataclass, replace

import torch

from common.condition import Condition
from common.seed import draw_uniform, make_generator
from stage2_distill.dmd.schedule import MicroBatch

JITTER_MEAN, JITTER_STD = -3.5, 0.5  # of log(time of the first frame / time of the video): `masks_like` of Wan2.2


@dataclass(frozen=True)
class ConditionDropout:
    """Shares of the samples that lose their first frame, and whose first frame has a small time."""

    text_only_fraction: float
    first_frame_jitter: float
    seed: int

    def augment(self, condition: Condition, micro_batch: MicroBatch) -> Condition:
        """The condition of a micro-batch with dropout and jitter; the same object if both shares are 0."""
        if condition.first_frame is None:  # text only already
            return condition
        if self.text_only_fraction:
            keeps_frame = draw_uniform(self.generators(micro_batch, "text only")) >= self.text_only_fraction
            # a record without a frame stays without
            given = keeps_frame if condition.given is None else keeps_frame & condition.given
            condition = replace(condition, given=given)
        if self.first_frame_jitter:
            jittered = draw_uniform(self.generators(micro_batch, "jitter")) < self.first_frame_jitter
            condition = replace(condition, frame_time=torch.where(jittered, self.jitter_times(micro_batch), 0))
        return condition

    def jitter_times(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Log-normal shares (B) of the video's time."""
        generators = self.generators(micro_batch, "jitter time")
        normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])
        return (JITTER_MEAN + JITTER_STD * normal).exp()

    def generators(self, micro_batch: MicroBatch, purpose: str) -> list[torch.Generator]:
        """One generator per sample for one purpose."""
        keys = micro_batch.sample_keys(self.seed)
        return [make_generator(*key, f"{micro_batch.role} {purpose}") for key in keys]
