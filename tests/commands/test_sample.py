"""The command `sample`: its memory modes and decoders give the same latents."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import av
import numpy
import pytest
import torch
from safetensors.torch import save_file

from commands.page_config import PageConfig
from commands.sample import sample_videos
from commands.video_studio import VideoStudio
from shards.latent_store import read_latents
from stage1_encode.config import DecodeConfig
from stage1_encode.decoders.load_decoder import TinyDecoder
from stage1_encode.decoders.tiny_network import TinyLayout
from stage1_encode.generation.decode import decode
from stage1_encode.video_metrics.evaluate_videos import decode_latents, load_tools
from stage2_distill.sampling.config import SampleConfig
from tests.tiny_models import random_tiny_decoder


def read_frames(path: Path) -> numpy.ndarray:
    with av.open(str(path)) as file:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(float)


def test_streamed_blocks_give_the_latents_of_full(student_run: Path, model: Path, tmp_path: Path) -> None:
    latents = []
    for vram in ("full", "12gb"):
        out = tmp_path / f"{vram}.mp4"
        sample_videos(
            SampleConfig(str(student_run), str(model), str(out), prompt="a red circle", vram=vram, device="cpu")
        )
        assert out.is_file()
        latents.append(read_latents(out.with_suffix(".zarr"), "sample", 0))
    assert torch.equal(*latents)


def test_another_decoder_changes_pixels_and_no_latents(
    student_run: Path, model: Path, dataset: Path, tmp_path: Path
) -> None:
    """`sample`, `decode` and the pixel half of `evaluate` show the same frames of the same latents."""
    file = tmp_path / "tiny.safetensors"
    save_file(random_tiny_decoder(TinyLayout(48, 12, (8, 4, 4, 4), is_wide=False)), file)
    full = SampleConfig(str(student_run), str(model), str(tmp_path / "full.mp4"), prompt="a circle", device="cpu")
    other = replace(full, out=str(tmp_path / "tiny.mp4"), decoder=str(file))
    stores = [Path(sample_videos(config)[0]).with_suffix(".zarr") for config in (full, other)]
    latents = [read_latents(store, "sample", 0) for store in stores]
    assert torch.equal(*latents)
    exact, sampled = (read_frames(Path(config.out)) for config in (full, other))
    assert exact.shape == sampled.shape
    assert abs(exact - sampled).mean() > 10
    assert f"decoder: {file}" in Path(f"{other.out}.yaml").read_text()
    (decoded, _) = decode(
        DecodeConfig(str(stores[0]), str(model), str(tmp_path / "again"), decoder=str(file), device="cpu")
    )
    assert abs(read_frames(decoded) - sampled).mean() < 1
    tools = load_tools(str(model), str(dataset), "cpu", judge=None, i3d_model=None, clip_model=None, decoder=str(file))
    assert isinstance(tools.vae.decoder, TinyDecoder)
    one, two = (decode_latents(tools.vae, latents[0].expand(count, -1, -1, -1, -1)) for count in (1, 2))
    assert (one[0].float() - two[1].float()).abs().max() <= 1
    lightness = [frames @ numpy.array((0.21, 0.72, 0.07)) for frames in (one[0].numpy(), sampled)]
    assert numpy.corrcoef(*(values.ravel() for values in lightness))[0, 1] > 0.9  # H.264 loses colours of single pixels


@pytest.mark.parametrize("problem", ["VAE of Wan2.1", "not finite", "lacks weights"])
def test_a_wrong_decoder_stops_before_anything_is_loaded(
    problem: str, student_run: Path, model: Path, dataset: Path, tmp_path: Path
) -> None:
    file, is_other = tmp_path / "taew.safetensors", problem.startswith("VAE")
    layout = TinyLayout(16, 3, (8, 4, 4, 4), is_wide=False) if is_other else TinyLayout(48, 12, (8, 4, 4, 4), False)
    changes = {"decoder.22.bias": torch.full((12,), torch.nan)} if problem == "not finite" else {}
    tensors = random_tiny_decoder(layout) | changes
    if problem == "lacks weights":
        del tensors["decoder.9.conv.2.bias"]
    save_file(tensors, file)
    options = {"model": str(model), "decoder": str(file), "device": "cpu"}
    config = SampleConfig(str(student_run), out=str(tmp_path / "x.mp4"), prompt="a", **options)
    tools = {"judge": None, "i3d_model": None, "clip_model": None}
    commands = [
        lambda: sample_videos(config),
        lambda: VideoStudio(PageConfig(str(student_run), out=str(tmp_path / "page"), **options)),
        lambda: load_tools(shards=str(dataset), **options, **tools),
    ]
    for command in commands:
        with (
            mock.patch("commands.sample.open_student", side_effect=AssertionError),
            mock.patch("commands.video_studio.open_student", side_effect=AssertionError),
            mock.patch("stage1_encode.models.vae.load_vae", side_effect=AssertionError),
            pytest.raises(ValueError, match=problem),
        ):
            command()
    assert not Path(config.out).exists()
