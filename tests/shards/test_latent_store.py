"""The store of latents gives back what was written, however many videos share a chunk."""

import re
from pathlib import Path

import pytest
import torch

from common.video import VideoSpec
from shards import latent_store

SPEC = VideoSpec(9, 64, 96, 12)


@pytest.mark.parametrize("together", [1, 3])
def test_rows_come_back(tmp_path: Path, together: int) -> None:
    videos = torch.randn((7, *SPEC.latent_shape), generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(7)))
    latent_store.create_group(
        tmp_path, latent_store.LatentGroup("a", SPEC, names, names, (0,) * 7), videos_per_chunk=together
    )
    for rows in ([0, 1], [5, 2], [3, 4], [6]):  # in a row or not, across chunks
        latent_store.write_latents(tmp_path, "a", rows, videos[rows])
    latent_store.finish_group(tmp_path, "a")
    assert torch.equal(latent_store.read_latent_rows(tmp_path, "a", 0, 7), videos)
    assert torch.equal(latent_store.read_latents(tmp_path, "a", 5), videos[5])


@pytest.mark.parametrize("key", ["../../escaped", "a/b", "a\\b", "..", ""])
def test_a_key_that_leaves_its_folder_is_refused(tmp_path: Path, key: str) -> None:
    latent_store.create_group(tmp_path, latent_store.LatentGroup("a", SPEC, ("fine", key), ("p", "p"), (0, 0)))
    with pytest.raises(ValueError, match=f"a: the key {re.escape(repr(key))} holds a path"):
        latent_store.describe_group(tmp_path, "a")
