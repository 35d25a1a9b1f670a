"""Decode: the way back through the VAE, mp4 files that play anywhere, a contact sheet."""

from pathlib import Path

import av
import numpy
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from common.video import VideoSpec
from shards import latent_store
from stage1_encode.config import DecodeConfig
from stage1_encode.generation.decode import decode, make_thumbnails, write_contact_sheet
from stage1_encode.media.video_writer import VideoWriter, write_video
from stage1_encode.models import vae
from tests import tiny_models

SPEC = VideoSpec(9, 64, 96, fps=12)


def make_store(path: Path, *, steps: tuple[str, ...] = ("sample",), videos: int = 2) -> Path:
    for step in steps:
        keys = tuple(f"{row:09d}" for row in range(videos))
        latent_store.create_group(path, latent_store.LatentGroup(step, SPEC, keys, ("p",) * videos, (0,) * videos))
        draw = torch.randn(videos, *SPEC.latent_shape, generator=torch.Generator().manual_seed(len(step)))
        latent_store.write_latents(path, step, range(videos), draw)
        latent_store.finish_group(path, step)
    return path


def moving_clip(frames: int = 9) -> numpy.ndarray:
    return numpy.stack([tiny_models.picture(64, 96, seed=5, shift=2 * index) for index in range(frames)])


def read_video(path: Path) -> numpy.ndarray:
    with av.open(str(path)) as file:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_videos_and_contact_sheet(model: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr")
    paths = decode(DecodeConfig(str(store), str(model), str(tmp_path / "out"), columns=3, device="cpu"))
    assert [path.name for path in paths] == ["000000000.mp4", "000000001.mp4", "contact.png"]
    assert Image.open(paths[2]).size == (3 * 96, 2 * 64)
    with av.open(str(paths[0])) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        assert (context.name, stream.format.name, stream.frames, stream.average_rate) == ("h264", "yuv420p", 9, 12)
        assert (context.height, context.width) == (64, 96)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    data = paths[0].read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # begins to play before it is all there


def test_pixels_are_those_of_diffusers(model: Path) -> None:
    draw = torch.randn(SPEC.latent_shape, generator=torch.Generator().manual_seed(0))
    own = vae.load_vae(model, dtype=torch.float32, device=torch.device("cpu"))
    reference = AutoencoderKLWan.from_pretrained(model / "vae")
    mean, std = (
        torch.tensor(v).view(48, 1, 1, 1) for v in (reference.config.latents_mean, reference.config.latents_std)
    )
    with torch.no_grad():
        expected = reference.decode((draw * std + mean)[None]).sample[0].permute(1, 2, 3, 0)
    result = vae.decode_video(own, draw)
    assert result.shape == (9, 64, 96, 3) and result.dtype == torch.uint8
    assert ((expected + 1) * 127.5 - result).abs().max() <= 0.51
    together = own.decoder.decode_batch(torch.stack([torch.zeros_like(draw), draw]))
    assert together.shape == (2, 9, 64, 96, 3)
    assert ((expected + 1) * 127.5 - together[1]).abs().max() <= 0.51
    assert (together[0] != together[1]).any()


def test_colours_survive_the_file(tmp_path: Path) -> None:
    pixels = numpy.broadcast_to(numpy.array([200, 30, 60], numpy.uint8), (5, 64, 96, 3))
    result = read_video(write_video(tmp_path / "flat.mp4", pixels, fps=24))
    assert abs(result.astype(int) - pixels).max() <= 3  # read as BT.601, the red would be 12 off
    clip = moving_clip()
    result = read_video(write_video(tmp_path / "clip.mp4", clip, fps=24))
    error = ((result.astype(float) - clip) ** 2).mean()
    assert 10 * numpy.log10(255**2 / error) > 30


def test_equal_pixels_give_equal_bytes(tmp_path: Path) -> None:
    files = [write_video(tmp_path / f"{i}.mp4", moving_clip(), fps=24).read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]
    assert not list(tmp_path.glob("*.partial"))


def test_the_contact_sheet_shows_first_and_last_frame() -> None:
    clip = moving_clip()
    sheet = make_thumbnails(clip, columns=3)
    assert numpy.array_equal(sheet[:, :96], clip[0])
    assert numpy.array_equal(sheet[:, 96:192], clip[4])
    assert numpy.array_equal(sheet[:, 192:], clip[8])


def test_several_steps_get_folders(model: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr", steps=("step-1", "step-20"), videos=1)
    paths = decode(DecodeConfig(str(store), str(model), str(tmp_path / "out"), device="cpu"))
    assert [str(path.relative_to(tmp_path / "out")) for path in paths] == [
        f"{step}/{name}" for step in ("step-1", "step-20") for name in ("000000000.mp4", "contact.png")
    ]


def test_the_same_command_again_accepts_what_it_made(model: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "x.zarr", steps=("student-seed-0", "teacher-seed-0"), videos=1)
    config = DecodeConfig(str(store), str(model), str(tmp_path / "out"), columns=1, device="cpu")
    paths = decode(config)
    (tmp_path / "out" / "contact-3.png").touch()  # of sample under torchrun
    assert decode(config) == paths
    (tmp_path / "out" / "student-seed-1").mkdir()
    with pytest.raises(ValueError, match=r"holds other files \(student-seed-1\)"):
        decode(config)


def test_a_contact_sheet_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_contact_sheet(tmp_path / "contact.png", [moving_clip()[0], moving_clip()[1]])
    assert not (tmp_path / "contact.png").exists()
    assert Image.open(tmp_path / "contact.png.partial").size == (96, 128)


def test_mistakes_are_named(model: Path, tmp_path: Path) -> None:
    config = DecodeConfig(str(tmp_path / "none.zarr"), str(model), str(tmp_path / "out"), device="cpu")
    with pytest.raises(ValueError, match="not a zarr store"):
        decode(config)
    store = make_store(tmp_path / "x.zarr", videos=2)
    config = DecodeConfig(str(store), str(model), str(tmp_path / "out"), device="cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        decode(config)
    chunk = store / "sample/latents/c/1"
    chunk.rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=f"latents={store}: sample: the chunk of 000000001, {chunk}/.*is missing"):
        decode(DecodeConfig(str(store), str(model), str(tmp_path / "out3"), device="cpu"))
    broken = torch.zeros(1, *SPEC.latent_shape)
    broken[0, 5, 0] = float("nan")
    latent_store.write_latents(store, "sample", [0], broken)
    with pytest.raises(ValueError, match="sample/000000000 is not finite"):
        decode(DecodeConfig(str(store), str(model), str(tmp_path / "out2"), device="cpu"))


def test_a_film_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(tmp_path / "x.mp4", fps=12) as writer:
        writer.add_frames(torch.from_numpy(moving_clip()))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_frames_given_in_pieces_make_the_same_file(tmp_path: Path) -> None:
    clip = torch.from_numpy(moving_clip())
    with VideoWriter(tmp_path / "a.mp4", fps=12) as writer:
        for piece in clip.split([1, 2, 6]):
            writer.add_frames(piece)
    assert (tmp_path / "a.mp4").read_bytes() == write_video(tmp_path / "b.mp4", moving_clip(), fps=12).read_bytes()
