"""The store of latents gives back what was written, however many videos share a chunk."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import zarr

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
    with pytest.raises(ValueError, match=f"a/zarr.json: .*the key {re.escape(repr(key))} holds a path"):
        latent_store.describe_group(tmp_path, "a")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A finished step `a` of the videos k0 to k2, two of them in the first chunk; the latents are zeros."""
    path = tmp_path / "l.zarr"
    group = latent_store.LatentGroup("a", SPEC, ("k0", "k1", "k2"), ("p",) * 3, (0,) * 3)
    latent_store.create_group(path, group, videos_per_chunk=2)
    latent_store.write_latents(path, "a", range(3), torch.zeros(3, *SPEC.latent_shape))
    latent_store.finish_group(path, "a", facts=latent_store.SetFacts("digest", 2.5))
    return path


CHUNK_BYTES = 4 * 2 * 48 * 3 * 4 * 6 + 4  # float32, two videos, crc32c


def test_zeros_are_stored_and_complete(store: Path) -> None:
    assert latent_store.group_damage(store, "a") is None
    assert not latent_store.read_latent_rows(store, "a", 0, 3).any()
    assert latent_store.read_group_facts(store, "a") == latent_store.SetFacts("digest", 2.5)


def damage_chunk(store: Path, change: Callable[[bytes], bytes | None]) -> None:
    """Change the bytes of the first chunk; None deletes it."""
    file = store / "a/latents/c/0/0/0/0/0"
    changed = change(file.read_bytes())
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: None, "is missing"),
        (lambda data: data[:1000], f"has 1000 bytes, expected {CHUNK_BYTES}"),
        (lambda data: b"", f"has 0 bytes, expected {CHUNK_BYTES}"),
        (lambda data: data + b"x", f"has {CHUNK_BYTES + 1} bytes, expected {CHUNK_BYTES}"),
        (lambda data: data[:700] + b"\1" + data[701:], "is damaged .*checksum"),
    ],
)
def test_a_chunk_that_is_lost_or_damaged_is_named_with_its_keys(store: Path, change, message: str) -> None:
    damage_chunk(store, change)
    for row in (0, 1):
        with pytest.raises(
            ValueError, match=f"latents={store}: a: (the|a) chunk of k[01].*{message}.*; sample it again"
        ):
            latent_store.read_latents(store, "a", row)
    assert not latent_store.read_latents(store, "a", 2).any()  # the other chunk
    if "damaged" not in message:  # the bytes themselves are checked only where they are read
        assert re.search(message, str(latent_store.group_damage(store, "a")))


def edit_json(file: Path, **fields: object) -> None:
    """Replace fields of a JSON file; dotted names lead into nested ones, None deletes."""
    content = json.loads(file.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target.pop(last)
        if value is not None:
            target[last] = value
    file.write_text(json.dumps(content))


SPEC_FIELDS = {"num_frames": 9, "height": 64, "width": 96, "fps": 12}


@pytest.mark.parametrize(
    "fields",
    [
        {"attributes": None},
        {"attributes": []},
        {"attributes__spec": None},
        {"attributes__spec": SPEC_FIELDS | {"height": 65}},
        {"attributes__spec": SPEC_FIELDS | {"height": "64"}},
        {"attributes__spec": SPEC_FIELDS | {"height": 128}},  # valid, and not that of the array
        {"attributes__keys": ["k0", "k1"]},
        {"attributes__keys": ["k0", None, "k2"]},
        {"attributes__prompts": None},
        {"attributes__seeds": "012"},
        {"attributes__done": 1},
    ],
)
def test_attributes_that_are_missing_or_wrong_are_named(store: Path, fields: dict[str, object]) -> None:
    edit_json(store / "a/zarr.json", **fields)
    with pytest.raises(ValueError, match=f"{store}/a/(latents/)?zarr.json"):
        latent_store.describe_group(store, "a")
    assert "zarr.json" in str(latent_store.group_damage(store, "a"))


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [3, 48, 3, 4, 7]},
        {"shape": [10**15, 48, 3, 4, 6]},
        {"shape": [-3, 48, 3, 4, 6]},
        {"shape": "3"},
        {"data_type": "int8"},
        {"chunk_grid__configuration__chunk_shape": [0, 48, 3, 4, 6]},
        {"chunk_grid__configuration__chunk_shape": [1, 48, 3, 4, 3]},
        {"codecs": [{"name": "gzip", "configuration": {"level": 1}}]},
        {"zarr_format": 2},
    ],
)
def test_an_array_of_another_form_is_named(store: Path, fields: dict[str, object]) -> None:
    edit_json(store / "a/latents/zarr.json", **fields)
    with pytest.raises(ValueError, match="latents/zarr.json"):
        latent_store.describe_group(store, "a")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nan", '{"attributes": {"complete": "yes"}}'])
def test_a_store_whose_description_is_damaged_is_named(store: Path, text: str) -> None:
    (store / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{store}/zarr.json: is damaged")):
        latent_store.is_store_complete(store)
    with pytest.raises(ValueError, match=re.escape(f"{store}/zarr.json: is damaged")):
        latent_store.create_group(store, latent_store.describe_group(store, "a"))


def test_a_store_of_version_0_1_is_read_and_its_lost_chunk_named(tmp_path: Path) -> None:
    """That version wrote neither checksums nor another fill value than 0."""
    shape = (2, *SPEC.latent_shape)
    group = zarr.open_group(tmp_path, mode="a").create_group("a")
    array = group.create_array("latents", shape=shape, chunks=(1, *shape[1:]), dtype="float32", compressors=None)
    array[:] = numpy.arange(math.prod(shape), dtype="float32").reshape(shape)
    described = {"spec": SPEC_FIELDS, "keys": ["k0", "k1"], "prompts": ["p", "p"], "seeds": [0, 0]}
    group.attrs.put(described | {"facts": {}, "done": True})
    assert latent_store.group_damage(tmp_path, "a") is None
    assert latent_store.read_latents(tmp_path, "a", 1).flatten()[0] == math.prod(shape) / 2
    shutil.rmtree(tmp_path / "a/latents/c/1")
    with pytest.raises(ValueError, match="a: the chunk of k1, .*c/1/0/0/0/0, is missing"):
        latent_store.read_latents(tmp_path, "a", 1)
