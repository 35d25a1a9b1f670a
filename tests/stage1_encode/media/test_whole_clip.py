"""Whole clips: which frames are displayed at which times, and files that are too short."""

from pathlib import Path

import numpy
import pytest

from common.video import VideoSpec
from stage1_encode.media.video_frame import UnreadableError
from stage1_encode.media.video_writer import write_video
from stage1_encode.media.whole_clip import read_clip

LEVELS = numpy.arange(20, 220, 10, dtype=numpy.uint8)  # 20 grey frames


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A video of 20 frames at 12 per second, each brighter than the one before."""
    frames = numpy.broadcast_to(LEVELS[:, None, None, None], (20, 64, 96, 3))
    return str(write_video(tmp_path_factory.mktemp("ramp") / "ramp.mp4", frames, fps=12))


@pytest.mark.parametrize(("fps", "expected"), [(12, range(9)), (6, range(0, 18, 2)), (24, [0, 0, 1, 1, 2, 2, 3, 3, 4])])
def test_frames_are_those_displayed_at_the_rate(ramp: str, fps: int, expected: list[int]) -> None:
    clip = read_clip(ramp, VideoSpec(9, 32, 32, fps))
    assert clip.shape == (9, 32, 32, 3) and clip.dtype == numpy.uint8
    assert numpy.abs(clip.mean(axis=(1, 2, 3)) - LEVELS[list(expected)]).max() < 2.5


def test_a_short_or_broken_clip_is_refused(ramp: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="shows 20 frames at 12 per second, 21 are needed"):
        read_clip(ramp, VideoSpec(21, 32, 32, 12))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnreadableError):
        read_clip(str(tmp_path / "text.mp4"), VideoSpec(9, 32, 32, 12))
