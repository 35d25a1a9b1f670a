"""Several ranks that share a video give the latents and the frames of one process."""

from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from shards.latent_store import read_latents
from stage2_distill.model.context_parallel import check_context_parallel
from stage2_distill.train import distill
from tests.forked import run_python
from tests.stage2_distill.training_helpers import make_config, make_shards
from tests.tiny_models import picture

ROOT = Path(__file__).parents[3]


def test_two_ranks_sample_the_video_of_one(model: Path, tmp_path: Path) -> None:
    """Each rank has 9 tokens of 3 frames with 6 tokens each, so that its part ends within a frame. Two segments.

    With the first-frame tokens or the rope of another rank the latents would differ by more than 0.01.
    """
    shards = make_shards(tmp_path / "data", model)
    options = {"iterations": 1, "global_batch": 2, "max_text_tokens": 32}
    distill(make_config(shards, model, tmp_path / "run", **options))
    Image.fromarray(picture(90, 160, seed=3)).save(tmp_path / "first.png")
    arguments = ["--checkpoint", tmp_path / "run", "--model", model, "--dtype", "float32", "--width", 96]
    arguments += ["--prompt", "a circle", "--image", tmp_path / "first.png", "--segments", 2, "--seed", 5]
    latents, frames = [], []
    for ranks in (1, 2):
        # In one thread: with several the VAE adds in another order, which rounding to bf16 enlarges.
        result = run_python("cli.py", "sample", *arguments, "--out", tmp_path / f"{ranks}.mp4", ranks=ranks)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.split() == [str(tmp_path / f"{ranks}.mp4")]
        latents.append(torch.stack([read_latents(tmp_path / f"{ranks}.zarr", "sample", segment) for segment in (0, 1)]))
        with av.open(tmp_path / f"{ranks}.mp4") as file:
            frames.append(torch.stack([torch.from_numpy(frame.to_ndarray()).int() for frame in file.decode(video=0)]))
    assert latents[0].shape[2:] == (3, 4, 6)
    assert (latents[0] - latents[1]).abs().max() < 1e-5
    assert len(frames[0]) == 17
    assert (frames[0] - frames[1]).abs().float().mean() < 0.05  # H.264 may code a byte that is one off otherwise


def test_indivisible_video_is_refused() -> None:
    check_context_parallel(8, tokens=27_280, heads=24)
    with pytest.raises(ValueError, match=r"5 processes .* 27280 tokens .* 24 heads .* give torchrun 2 or 4"):
        check_context_parallel(5, tokens=27_280, heads=24)
