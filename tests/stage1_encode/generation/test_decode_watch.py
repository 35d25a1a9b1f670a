"""`decode --watch` beside a run that still writes."""

import time
from pathlib import Path

import pytest
import torch

from common.video import VideoSpec
from shards import latent_store
from stage1_encode.config import DecodeConfig
from stage1_encode.generation import decode

SPEC = VideoSpec(num_frames=5, height=32, width=32, fps=8)


def begin(store: Path, step: str) -> None:
    latent_store.create_group(store, latent_store.LatentGroup(step, SPEC, ("a", "b"), ("one", "two"), (0, 0)))


def end(store: Path, step: str) -> None:
    draws = torch.Generator().manual_seed(len(step))
    latent_store.write_latents(store, step, [0, 1], torch.randn(2, *SPEC.latent_shape, generator=draws))
    latent_store.finish_group(store, step)


def test_new_steps_are_decoded_as_they_appear(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = tmp_path / "previews.zarr", tmp_path / "videos"
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    config = DecodeConfig(str(store), str(model), str(out), watch=True, device="cpu")

    def next_sleep(seconds: float) -> None:
        """What the run does while the watcher sleeps."""
        slept.append(seconds)
        if len(slept) == 2:  # nothing was there at first
            latent_store.mark_store_complete(store, False)
            begin(store, "step-000000")
            end(store, "step-000000")
            begin(store, "step-000002")
        if len(slept) == 4:
            end(store, "step-000002")
            latent_store.mark_store_complete(store, True)

    monkeypatch.setattr(time, "sleep", next_sleep)
    made = decode.decode_as_written(config)
    assert next(made) == out / "step-000000" / "contact.png"
    assert not (out / "step-000002").exists(), "it is still being written"
    assert list(made) == [out / "step-000002" / "contact.png"]
    assert {path.name for path in (out / "step-000002").iterdir()} == {"a.mp4", "b.mp4", "contact.png"}
    assert len(slept) == 4
    before = (out / "step-000000" / "a.mp4").stat().st_mtime_ns
    assert list(decode.decode_as_written(config)) == [], "the same command has nothing left to do"
    assert (out / "step-000000" / "a.mp4").stat().st_mtime_ns == before
