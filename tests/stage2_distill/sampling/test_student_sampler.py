"""Sizes that a student refuses; its samples are tested with the commands and the sampler's own parts."""

import re
from pathlib import Path

import pytest

from common.video import VideoSpec
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import check_positions, open_student


@pytest.mark.parametrize(("name", "limit", "step"), [("num_frames", 61, 4), ("height", 512, 32), ("width", 512, 32)])
def test_a_video_has_no_more_positions_than_the_model(name: str, limit: int, step: int) -> None:
    size = {"num_frames": 5, "height": 32, "width": 32}
    check_positions(VideoSpec(**size | {name: limit}), 16)
    problem = f"{name}={limit + step}: the model has positions up to {limit}; give a smaller number"
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        check_positions(VideoSpec(**size | {name: limit + step}), 16)


def test_a_student_is_opened_with_sizes_of_its_model_only(model: Path) -> None:
    config = SampleConfig(str(model / "transformer"), str(model), "o.mp4", prompt="a", width=1025 * 32, device="cpu")
    with pytest.raises(ValueError, match="^width=32800: the model has positions up to 32768; "):
        open_student(config)
