"""How often, and how surely, training gives the first frame: a pure function of seed, iteration and sample."""

from dataclasses import replace

import torch

from common.condition import Condition
from common.seed import draw_uniform, make_generator
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.schedule import MicroBatch

JITTER_MEAN, JITTER_DEVIATION = -3.5, 0.5  # of log(time of the first frame / time of the video): `masks_like` of Wan2.2


def augment_condition(condition: Condition, micro_batch: MicroBatch, config: DistillConfig) -> Condition:
    """Take the first frame from a share of the samples, and give some of the others a small time there."""
    if condition.first_frame is None:
        return condition
    if config.text_only_fraction:
        keeps_frame = sample_uniforms(micro_batch, config, "text only") >= config.text_only_fraction
        condition = replace(condition, given=keeps_frame if condition.given is None else keeps_frame & condition.given)
    if config.first_frame_jitter:
        jittered = sample_uniforms(micro_batch, config, "jitter") < config.first_frame_jitter
        condition = replace(condition, frame_time=torch.where(jittered, frame_time_jitter(micro_batch, config), 0))
    return condition


def sample_uniforms(micro_batch: MicroBatch, config: DistillConfig, purpose: str) -> torch.Tensor:
    """Uniform draws (B) that decide for each sample."""
    return draw_uniform(
        [
            make_generator(config.seed, micro_batch.iteration, s, f"{micro_batch.role} {purpose}")
            for s in micro_batch.samples
        ]
    )


def frame_time_jitter(micro_batch: MicroBatch, config: DistillConfig) -> torch.Tensor:
    """Log-normal shares (B) of the video's time."""
    generators = [
        make_generator(config.seed, micro_batch.iteration, s, f"{micro_batch.role} jitter time")
        for s in micro_batch.samples
    ]
    normal = torch.cat([torch.randn(1, generator=draw) for draw in generators])
    return (JITTER_MEAN + JITTER_DEVIATION * normal).exp()
