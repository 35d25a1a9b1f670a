"""Tools that know nothing of this project read the tars."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
import webdataset
from safetensors.torch import load

from shards.dataset import open_data_set
from shards.manifest import read_manifest
from shards.mixture import RecordStream
from tests.shards.data_sets import make_data_set, make_record

COUNTS = [3, 2]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("data"), COUNTS)


def assert_same_record(key, tensors, metadata, number):
    expected, loaded = make_record(number), load(tensors)
    assert key == expected.key and metadata["prompt"] == expected.source.prompt and metadata["size"] == [72, 128]
    assert torch.equal(loaded["text"], expected.text) and torch.equal(loaded["first_frame"], expected.first_frame)


def test_webdataset(folder):
    urls = [str(folder / shard.name) for shard in read_manifest(folder).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == sum(COUNTS)
    for number, sample in enumerate(samples):
        assert_same_record(sample["__key__"], sample["safetensors"], json.loads(sample["json"]), number)


def test_webdataset_decodes_by_a_handler(folder):
    handler = webdataset.handle_extension("safetensors", load)
    samples = webdataset.WebDataset(str(folder / "shard-{000000..000001}.tar"), shardshuffle=False).decode(handler)
    assert [tuple(sample["safetensors"]["first_frame"].shape) for sample in samples] == [(48, 1, 2, 4)] * sum(COUNTS)


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets(folder, tmp_path, streaming):
    files = {"train": sorted(str(path) for path in folder.glob("shard-*.tar"))}
    data = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = list(data)
    assert len(rows) == sum(COUNTS)
    for number, row in enumerate(rows):
        assert_same_record(row["__key__"], row["safetensors"], row["json"], number)


def test_tarfile_and_tar(folder):
    names, number = [], 0
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            members = tar.getmembers()
            for first, second in zip(members[::2], members[1::2], strict=True):
                metadata = json.loads(tar.extractfile(second).read())
                assert_same_record(first.name.split(".")[0], tar.extractfile(first).read(), metadata, number)
                number += 1
        names += [member.name for member in members]
    listed = subprocess.run(["tar", "-tf", folder / "shard-000000.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == names[: 2 * COUNTS[0]] and number == sum(COUNTS)


def test_a_reader_written_from_the_format_page_agrees(folder):
    """The Python example in docs/format.md runs as it stands, and finds what the product finds."""
    page = (ROOT / "docs" / "format.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    script = f"{code}\nfor position in (0, 1, 7, 23): print(json.dumps(read(sys.argv[1], position, seed=5)))"
    completed = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    stream = RecordStream(open_data_set(folder), seed=5)
    expected = [stream.data.read_record(stream.record_index(position)) for position in (0, 1, 7, 23)]
    for line, record in zip(completed.stdout.splitlines(), expected, strict=True):
        key, prompt, tensors = json.loads(line)
        assert (key, prompt, set(tensors)) == (record.key, record.source.prompt, {"first_frame", "text"})
        for name, tensor in (("first_frame", record.first_frame), ("text", record.text)):
            assert tensors[name][0] == list(tensor.shape) and tensors[name][1] == tensor.float().flatten().tolist()
