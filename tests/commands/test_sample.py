"""The command `sample`: its memory modes give the same latents."""

from pathlib import Path

import torch

from commands.sample import sample_videos
from shards.latent_store import read_latents
from stage2_distill.sampling.config import SampleConfig


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
