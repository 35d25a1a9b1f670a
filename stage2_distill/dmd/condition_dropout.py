"""How often, and how surely, training gives the first frame: a pure function of seed, iteration and sample."""

from dataclasses import replace

import torch

from common.condition import Condition
from common.seed import draw_uniform, make_generator
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.schedule import Part

JITTER_MEAN, JITTER_DEVIATION = -3.5, 0.5  # of log(time of the first frame / time of the video): `masks_like` of Wan2.2


def vary(condition: Condition, part: Part, config: DistillConfig) -> Condition:
    """Take the first frame from a share of the samples, and give some of the others a small time there."""
    if condition.first_frame is None:
        return condition
    if config.text_only_fraction:
        kept = chosen(part, config, "text only") >= config.text_only_fraction
        condition = replace(condition, given=kept if condition.given is None else kept & condition.given)
    if config.first_frame_jitter:
        noisy = chosen(part, config, "jitter") < config.first_frame_jitter
        condition = replace(condition, frame_time=torch.where(noisy, jitter(part, config), 0))
    return condition


def chosen(part: Part, config: DistillConfig, purpose: str) -> torch.Tensor:
    """Uniform draws (B) that decide for each sample."""
    return draw_uniform(
        [make_generator(config.seed, part.iteration, s, f"{part.role} {purpose}") for s in part.samples]
    )


def jitter(part: Part, config: DistillConfig) -> torch.Tensor:
    """Log-normal shares (B) of the video's time."""
    draws = [make_generator(config.seed, part.iteration, s, f"{part.role} jitter time") for s in part.samples]
    normal = torch.cat([torch.randn(1, generator=draw) for draw in draws])
    return (JITTER_MEAN + JITTER_DEVIATION * normal).exp()
