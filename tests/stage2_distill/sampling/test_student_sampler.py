"""Sizes that a student refuses, and its predicted time; its samples are tested with the commands."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.planning.cards import find_card
from common.video import VideoSpec
from stage2_distill.planning.duration import forward_seconds
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import StudentSampler, check_positions, open_student, predict_seconds


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


def test_predicted_time_is_that_of_the_given_size(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SampleConfig(str(model / "transformer"), str(model), "o.mp4", prompt="a", dtype="float32", device="cpu")
    student = open_student(config)
    assert student.denoising_seconds is None and predict_seconds(student, VideoSpec()) is None, "of a CPU none is known"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(StudentSampler, "device", SimpleNamespace(type="cuda"))
    size, steps = TransformerSize.of(student.net.config), len(student.sigmas)
    for spec in (VideoSpec(), VideoSpec(9, 64, 64)):
        one = forward_seconds(size, spec, find_card("h200"), "cudnn", text_tokens=512).total
        assert predict_seconds(student, spec) == pytest.approx(1.3 * steps * one)  # not compiled
