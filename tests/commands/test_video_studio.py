"""What stands behind the page: the videos of `sample` and of the teacher, stops, and wrong requests."""

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from commands.page_config import PageConfig, TeacherConfig, VideoRequest
from commands.sample import sample_videos
from commands.video_studio import VideoStudio
from common.flow import shift
from common.options import resolve_config
from common.seed import draw_normal, make_generator
from shards.latent_store import read_latents
from shards.record import collate_records, pad_text
from stage1_encode.generation.condition_encoder import encode_conditions, encode_prompt
from stage1_encode.media.rows import Row
from stage2_distill.dmd.rollout import sample_euler
from stage2_distill.model.wan import guided, make_denoiser
from stage2_distill.sampling.config import SampleConfig
from tests.tiny_models import picture

SCALE, STEPS, NEGATIVE = 3.0, 6, "blurry"


@pytest.fixture(scope="module")
def studio(model: Path, student_run: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoStudio:
    out = tmp_path_factory.mktemp("studio") / "videos"
    config = PageConfig(
        str(student_run), str(model), str(out), teacher_steps=STEPS, guidance_scale=SCALE, negative_prompt=NEGATIVE,
        dtype="float32", device="cpu",
    )  # fmt: skip
    return VideoStudio(config)


@pytest.fixture
def drawing(tmp_path: Path) -> str:
    path = tmp_path / "Drawing.PNG"
    Image.fromarray(picture(80, 120, seed=3)).save(path)
    return str(path)


def ignore_steps(done: int, total: int) -> None:
    """A visitor who waits."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def latents(video: Path, row: int = 0) -> numpy.ndarray:
    return read_latents(video.with_suffix(".zarr"), "sample", row)


def test_a_video_is_that_of_sample(studio: VideoStudio, drawing: str, tmp_path: Path) -> None:
    steps = list[tuple[int, int]]()
    request = VideoRequest("a red circle", drawing, seed=5, num_frames=5, height=32, width=96, segments=2)
    video = studio.make_student_video(request, lambda *step: steps.append(step))
    assert steps == [(done, 8) for done in range(8)]
    assert (video.spec.num_frames, video.spec.height, video.spec.width) == (5, 32, 96)
    stem = video.path.stem
    kept = [f"{stem}-picture.png", f"{stem}.mp4", f"{stem}.mp4.yaml", f"{stem}.zarr"]
    assert [name for name in names(studio.out) if name.startswith(stem)] == kept
    # the file of options beside it, without the page and its upload, makes the same video again
    Path(drawing).unlink()
    saved = resolve_config(SampleConfig, {"config": f"{video.path}.yaml", "out": str(tmp_path / "again.mp4")})
    assert (saved.seed, saved.segments, saved.prompt) == (5, 2, "a red circle")
    sample_videos(saved)
    for row in range(2):
        assert numpy.array_equal(latents(tmp_path / "again.mp4", row), latents(video.path, row))
    assert (tmp_path / "again.mp4").read_bytes() == video.path.read_bytes()
    other = studio.make_student_video(replace(request, image=None, seed=6), ignore_steps)
    assert other.path.name == f"video-{int(stem[-4:]) + 1:04d}.mp4"
    assert not numpy.array_equal(latents(other.path), latents(video.path))


def test_the_teacher_takes_guided_steps_from_the_same_noise(studio: VideoStudio, drawing: str) -> None:
    video = studio.make_student_video(VideoRequest("a red circle", drawing, seed=7), ignore_steps)
    steps = list[tuple[int, int]]()
    teacher = studio.make_teacher_video(video, lambda *step: steps.append(step))
    assert steps == [(done, STEPS) for done in range(STEPS)]
    assert teacher.path == video.path.with_name(f"{video.path.stem}-teacher.mp4")
    # the same by hand
    assert studio.teacher is not None
    row = Row(0, 2, drawing, "a red circle", 7, "")
    (record,) = encode_conditions(studio.encoder, [row], Path("table.csv"), video.spec, keep_text_on_device=True)
    negative = pad_text(encode_prompt(studio.encoder, NEGATIVE, keep_text_on_device=True))
    assert negative.abs().sum() > 0
    denoiser = guided(make_denoiser(studio.teacher.net, torch.float32), negative_text=negative, scale=SCALE)
    noise = draw_normal(video.spec.latent_shape, [make_generator(7, 0, 0, "sample", torch.device("cpu"))])
    sigmas = [shift(1 - step / STEPS, studio.facts.shift) for step in range(STEPS)]
    assert sigmas[0] == 1 and all(low < high for high, low in pairwise(sigmas))
    expected = sample_euler(denoiser, noise, collate_records([record]), sigmas=sigmas)
    assert numpy.allclose(latents(teacher.path), expected[0].numpy(), atol=1e-5)
    saved = resolve_config(TeacherConfig, {"config": f"{teacher.path}.yaml"})
    assert (saved.teacher_steps, saved.guidance_scale, saved.negative_prompt) == (STEPS, SCALE, NEGATIVE)
    # and it computes with the weights of the model, not of the student
    assert any(
        (a != b).any() for a, b in zip(studio.teacher.net.parameters(), studio.student.net.parameters(), strict=True)
    )


def test_products_in_8_bits_are_those_of_sample(
    fp8_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PageConfig(
        str(fp8_model / "transformer"), str(fp8_model), str(tmp_path / "videos"), teacher_steps=1, precision="fp8",
        device="cpu",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        page = VideoStudio(config)
    assert len([line for line in caplog.messages if line.startswith("precision=fp8: ") and "5 %" in line]) == 1
    video = page.make_student_video(VideoRequest("a red circle", num_frames=5, height=32, width=32), ignore_steps)
    saved = resolve_config(SampleConfig, {"config": f"{video.path}.yaml", "out": str(tmp_path / "again.mp4")})
    for precision, is_same in (("fp8", True), ("exact", False)):
        sample_videos(replace(saved, precision=precision))
        assert numpy.array_equal(latents(tmp_path / "again.mp4"), latents(video.path)) is is_same
    teacher = page.make_teacher_video(video, ignore_steps)
    assert resolve_config(TeacherConfig, {"config": f"{teacher.path}.yaml"}).precision == "exact"
    with pytest.raises(ValueError, match=r"^precision=fp8: needs dtype=bfloat16, not float32"):
        replace(config, dtype="float32")


class VisitorError(Exception):
    """What a visitor's stop raises."""


def test_a_stop_leaves_nothing_and_the_next_video_is_right(studio: VideoStudio, drawing: str) -> None:
    request = VideoRequest("a blue square", drawing, seed=1, num_frames=5, height=32, width=32, segments=2)
    expected = studio.make_student_video(request, ignore_steps)
    before = names(studio.out)

    def stop(done: int, total: int) -> None:
        if done == 5:  # in the second segment, when the first one is in the file
            raise VisitorError

    with pytest.raises(VisitorError):
        studio.make_student_video(request, stop)
    with pytest.raises(VisitorError):
        studio.make_teacher_video(expected, stop)
    assert names(studio.out) == before
    after = studio.make_student_video(request, ignore_steps)
    assert numpy.array_equal(latents(after.path, 1), latents(expected.path, 1))
    assert after.path.read_bytes() == expected.path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "prompt is empty: describe the video"),
        ({"prompt": "&nbsp; &amp;nbsp;"}, r"^prompt=.*: nothing is left after HTML is unescaped; describe the video"),
        ({"width": 100}, "width=100: must be a multiple of 32; nearest are 96 and 128"),
        ({"num_frames": 6}, "num_frames=6: the VAE needs"),
        ({"width": 1280, "height": 1280, "num_frames": 121}, "width=1280: 1280 x 1280, 121 frames, is larger than"),
        ({"segments": 0}, "segments=0: must be at least 1"),
        ({"segments": 1000}, "segments=1000: the page makes at most 32; "),
        ({"seed": -1}, "seed=-1: must be between 0 and 999999999999999999"),
        ({"seed": None}, "seed=None: must be int"),
        ({"seed": 10**30}, r"seed=1000.*: must be between 0 and 999999999999999999"),
        ({"image": "words.png"}, "image=words.png: is no readable video"),
        ({"image": "gone.png"}, "image=gone.png: does not exist; give a PNG, JPEG or WebP file"),
    ],
)
def test_a_wrong_request_is_one_line(
    changes: dict[str, object], message: str, studio: VideoStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.png").write_text("no picture")
    before = names(studio.out)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        studio.make_student_video(replace(VideoRequest("a"), **changes), ignore_steps)
    assert "\n" not in str(caught.value)
    assert names(studio.out) == before


def test_streamed_networks_make_the_same_videos(studio: VideoStudio, tmp_path: Path) -> None:
    made = []
    for vram in ("full", "12gb"):
        own = VideoStudio(replace(studio.config, out=str(tmp_path / vram), vram=vram))
        first = own.make_student_video(VideoRequest("a red circle", seed=2), ignore_steps)
        teacher = own.make_teacher_video(first, ignore_steps)
        made.append([latents(video.path) for video in (first, teacher)])
    assert all(numpy.array_equal(*pair) for pair in zip(*made, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vram", ["full", "16gb", "12gb"])
def test_one_network_at_a_time_is_on_the_gpu(vram: str, studio: VideoStudio, tmp_path: Path) -> None:
    own = VideoStudio(replace(studio.config, out=str(tmp_path / "videos"), device="cuda", vram=vram))
    first = own.make_student_video(VideoRequest("a red circle", seed=2), ignore_steps)
    own.make_teacher_video(first, ignore_steps)
    assert own.teacher is not None
    assert next(own.student.net.parameters()).device.type == "cpu"
    again = own.make_student_video(VideoRequest("a red circle", seed=2), ignore_steps)
    assert next(own.teacher.net.parameters()).device.type == "cpu"
    assert numpy.array_equal(latents(again.path), latents(first.path))
