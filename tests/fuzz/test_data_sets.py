"""Fuzzing what stage one reads and the data set: CSV bytes, manifest, sidecar, tar members, latent stores.

Whatever the bytes are, `verify` reports and readers raise ValueError; any other exception fails a test.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.video import VideoSpec
from shards import latent_store
from shards.dataset import open_data_set
from shards.verification.verify import verify_data_set
from stage1_encode.media.rows import read_shard_rows
from tests.fuzz.strategies import JSON, fuzz_settings, mutated_bytes, mutated_json
from tests.shards import forgery
from tests.shards.data_sets import make_data_set

TABLE = 'video,prompt,seed\na.mp4,"a dog, running",3\nb.mp4;c,two,\n"b ""c""",é\n'.encode()
CSV_PARTS = st.lists(
    st.sampled_from([
        b"video", b"path", b"image", b"prompt", b"text", b"seed", b",", b";", b"\t", b'"', b'""', b"\n", b"\r", b"\r\n",
        b" ", b"\\", b"\\\"", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"a.mp4", b"s3://x", b"~/x",
        b"$HOME",
        b"9" * 5000, b"-1", b"x" * 150_000, "é٣".encode(),
    ]),
    max_size=30,
).map(b"".join)  # fmt: skip
CSV_BYTES = st.one_of(CSV_PARTS, CSV_PARTS.map(lambda part: b"video,prompt,seed\n" + part), mutated_bytes(TABLE))


@contextmanager
def folder_copy(source: Path) -> Iterator[Path]:
    """A copy of a folder that may be changed."""
    with tempfile.TemporaryDirectory() as temporary:
        yield shutil.copytree(source, Path(temporary) / "copy")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("fuzz") / "data", [2])


def try_data_set(folder: Path) -> None:
    """Verify a data set and read all of it; a sound one, or one with a finding."""
    problems, error = verify_data_set(folder).problems, None
    try:
        data = open_data_set(folder)
        for index in range(min(data.num_records, 4)):
            data.read_record(index)
    except ValueError as raised:
        error = raised
    assert error is None or problems, f"the reader refuses what verify accepts: {error}"


@fuzz_settings
@given(data=CSV_BYTES, text_only=st.booleans())
def test_csv_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, text_only: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(data)
    with suppress(ValueError):
        list(read_shard_rows(path, shard_size=2, text_only=text_only))


@fuzz_settings
@given(st.data())
def test_manifest(data_set: Path, data: st.DataObject) -> None:
    with folder_copy(data_set) as folder:
        fields = json.loads((folder / "manifest.json").read_text())
        changed = data.draw(mutated_json(fields))

        def replace_all(target: dict[str, object]) -> None:
            target.clear()
            target.update(changed)

        forgery.sign_manifest(folder, replace_all)
        try_data_set(folder)


@fuzz_settings
@given(st.data())
def test_manifest_bytes(data_set: Path, data: st.DataObject) -> None:
    with folder_copy(data_set) as folder:
        path = folder / data.draw(st.sampled_from(["manifest.json", "negative.safetensors", "failures.csv"]))
        old = path.read_bytes() if path.exists() else b"line,path,reason\n2,broken.mp4,no frame\n"
        path.write_bytes(data.draw(mutated_bytes(old)))
        try_data_set(folder)


@fuzz_settings
@given(st.data())
def test_sidecar(data_set: Path, data: st.DataObject) -> None:
    with folder_copy(data_set) as folder:
        old = (folder / forgery.SIDECAR).read_bytes()
        changed = mutated_json(json.loads(old)).map(lambda fields: json.dumps(fields).encode())
        forgery.sign_sidecar_bytes(folder, data.draw(changed | changed | mutated_bytes(old)))
        try_data_set(folder)


def split_header(data: bytes) -> tuple[dict[str, object], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@fuzz_settings
@given(st.data())
def test_tar_members(data_set: Path, data: st.DataObject) -> None:
    with folder_copy(data_set) as folder:
        entries = forgery.read_entries(folder)
        number = data.draw(st.integers(0, len(entries) - 1))
        old = entries[number][1]
        if number % 2:  # facts
            changed = mutated_json(json.loads(old)).map(lambda fields: json.dumps(fields).encode())
        else:
            header, tensors = split_header(old)
            changed = (mutated_json(header) | JSON).map(
                lambda fields: join_header(json.dumps(fields).encode(), tensors)
            )
        forgery.sign_member(folder, number, data.draw(changed | changed | mutated_bytes(old)))
        try_data_set(folder)


@fuzz_settings
@given(st.data())
def test_tar_bytes(data_set: Path, data: st.DataObject) -> None:
    """Headers too: links, devices, pax records and sizes of any kind, with the sidecar's offsets as they were."""
    with folder_copy(data_set) as folder:
        members = json.loads((folder / forgery.SIDECAR).read_text())["members"]
        old = (folder / forgery.SHARD).read_bytes()
        begin = data.draw(st.sampled_from([0, *(member["offset"] - 512 for member in members)]))
        header = data.draw(mutated_bytes(old[begin : begin + 512]))
        forgery.sign_tar_bytes(folder, old[:begin] + header + old[begin + 512 :], members)
        try_data_set(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, spec = tmp_path_factory.mktemp("fuzz") / "l.zarr", VideoSpec(5, 32, 32, 8)
    latent_store.create_group(path, latent_store.LatentGroup("a", spec, ("k", "l"), ("p", "q"), (0, 1)))
    latent_store.write_latents(path, "a", [0, 1], torch.ones(2, *spec.latent_shape))
    latent_store.finish_group(path, "a")
    return path


@fuzz_settings
@given(st.data())
def test_latent_store(store: Path, data: st.DataObject) -> None:
    with folder_copy(store) as folder:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        old, changed = path.read_bytes(), mutated_bytes(path.read_bytes())
        if path.suffix == ".json":
            changed |= mutated_json(json.loads(old)).map(lambda fields: json.dumps(fields).encode())
        path.write_bytes(data.draw(changed))
        with suppress(ValueError):
            for step in latent_store.complete_groups(folder):
                group = latent_store.describe_group(folder, step)
                latent_store.read_group_facts(folder, step)
                for row in range(len(group.keys)):
                    latent_store.read_latents(folder, step, row)
        latent_store.group_damage(folder, "a")
