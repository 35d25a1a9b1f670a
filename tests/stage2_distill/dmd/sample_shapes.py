"""Shapes of samples for tests of what reads the schedule."""

from stage2_distill.config import DistillConfig
from stage2_distill.dmd.video_shapes import SampleShapes


def one_size(config: DistillConfig) -> SampleShapes:
    """Shapes of records that all have the configured height and width."""
    return SampleShapes(config.seed, config.lengths, lambda position: config.spec)
