"""Forged data sets with right hashes: `verify` names file and member, the reader raises a ValueError; neither fails."""

import hashlib
import json
import re
import shutil
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from shards.dataset import open_data_set
from shards.verification.verify import verify_data_set
from tests.shards import forgery
from tests.shards.data_sets import TEXT_DIM, make_data_set

DEEP = b"[" * 100_000 + b"]" * 100_000
TENSORS, FACTS = "clip-000000.safetensors", "clip-000000.json"


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("clean") / "data", [2])


@pytest.fixture
def folder(clean_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean_folder, tmp_path / "data")


def read_all(folder: Path) -> None:
    """What training does with a data set."""
    data = open_data_set(folder)
    for index in range(data.num_records):
        data.read_record(index)


def expect_finding(folder: Path, file: str, member: str, reason: str, *, readable: bool = False) -> None:
    """`verify` reports file, member and reason, and the reader refuses with the same reason."""
    problems = [str(problem) for problem in verify_data_set(folder).problems]
    assert any(file in one and member in one and re.search(reason, one) for one in problems), problems
    if not readable:
        with pytest.raises(ValueError, match=f"{file}.*{reason}"):
            read_all(folder)


def header(data: bytes) -> bytes:
    """A safetensors file with any bytes as its header."""
    return struct.pack("<Q", len(data)) + data + bytes(64)


def one_tensor(**fields: object) -> bytes:
    """A safetensors file with one entry `text` of a header."""
    entry = {"dtype": "BF16", "shape": [2, 16], "data_offsets": [0, 64]} | fields
    return header(json.dumps({"text": entry}).encode())


OVERLAP = {
    "text": {"dtype": "BF16", "shape": [2, TEXT_DIM], "data_offsets": [0, 32]},
    "first_frame": {"dtype": "BF16", "shape": [48, 1, 2, 4], "data_offsets": [0, 768]},
}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(b"[1]"), "Expected `object`, got `array`"),
        (header(DEEP), "header"),
        (header(b'{"text":' + DEEP + b"}"), "header"),
        (header(b'{"x":' + DEEP + b"}"), "recursion"),
        (header(b"{"), "truncated"),
        (header(b"\xff\xfe"), "header"),
        (b"", "header"),
        (struct.pack("<Q", 2**63), "header"),
        (one_tensor(shape=[-2, -16]), "`int` >= 0"),
        (one_tensor(shape=[2**60, 2]), "`int` <= "),
        (one_tensor(shape=[2, 17]), "has 64 bytes"),
        (one_tensor(shape=[]), "has 64 bytes"),
        (one_tensor(shape="ab"), "Expected `array`"),
        (one_tensor(dtype="I64"), "Invalid enum value"),
        (one_tensor(dtype=None), "Expected `str`"),
        (one_tensor(data_offsets=[64, 0]), "bytes"),
        (one_tensor(data_offsets=[0, 10**13]), "bytes"),
        (one_tensor(data_offsets=[0]), "length 2"),
        (one_tensor(shape=[0, 16], data_offsets=[0, 0]), "has 0 bytes"),
        (header(b'{"__metadata__": {"a": "b"}}'), "missing required field `text`"),
        (save({"text": torch.zeros(2, 9, dtype=torch.bfloat16)}), r"text is \(2, 9\)"),
        (save({"text": torch.zeros(2, TEXT_DIM)}), r"text is .* torch.float32"),
        (save({"text": torch.zeros((), dtype=torch.bfloat16)}), r"text is \(\)"),
        (save({"first_frame": torch.zeros(48, 1, 2, 4, dtype=torch.bfloat16)}), "missing required field `text`"),
    ],
)
def test_tensors_of_another_form_are_named(folder: Path, data: bytes, reason: str) -> None:
    forgery.sign_member(folder, 0, data)
    problems = [str(problem) for problem in verify_data_set(folder).problems]
    assert problems and problems[0].startswith(f"shard-000000.tar: {TENSORS.removesuffix('.safetensors')}")
    with pytest.raises(ValueError, match=f"shard-000000.tar: {TENSORS}: is not a record .*{reason}"):
        read_all(folder)


def test_tensors_that_overlap_are_found_by_the_library(folder: Path) -> None:
    data = json.dumps(OVERLAP).encode()
    forgery.sign_member(folder, 0, struct.pack("<Q", len(data)) + data + bytes(768))
    expect_finding(folder, "shard-000000.tar", "clip-000000", "is not a record", readable=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": None}, "Expected `str`, got `null`"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 7}, "Expected `str`"),
        ({"path": None}, "Expected `str`, got `null`"),
        ({"line": "x"}, "Expected `int`, got `str`"),
        ({"line": True}, "Expected `int`, got `bool`"),
        ({"line": -1}, "`int` >= 0"),
        ({"line": 2**70}, "Expected `int`|out of range|<="),
        ({"size": [5]}, "length 2"),
        ({"size": {"height": 5}}, "Expected `array"),
        ({"seed": "0"}, "Expected `int"),
        ({"frame": 1.5}, "Expected `int`, got `float`"),
    ],
)
def test_facts_of_another_type_are_named(folder: Path, fields: dict[str, object], reason: str) -> None:
    facts = json.loads(forgery.read_entries(folder)[1][1])
    forgery.sign_member(folder, 1, json.dumps(facts | fields).encode())
    expect_finding(folder, "shard-000000.tar", "clip-000000", reason)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", DEEP, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff"]
)
def test_facts_that_are_not_a_record_are_named(folder: Path, data: bytes) -> None:
    forgery.sign_member(folder, 1, data)
    expect_finding(folder, "shard-000000.tar", "clip-000000", "clip-000000.json: is damaged")


def test_fields_of_a_later_version_are_ignored(folder: Path) -> None:
    facts = json.loads(forgery.read_entries(folder)[1][1])
    forgery.sign_member(folder, 1, json.dumps(facts | {"added_later": [1]}).encode())
    forgery.sign_sidecar(folder, lambda fields: fields.update(added_later=1))
    forgery.sign_manifest(folder, lambda fields: fields["encoder"].update(added_later={}))
    assert verify_data_set(folder).problems == ()
    read_all(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda members: members[1].update(size=10**13), f"{FACTS}: 10000000000000 bytes from .* not between"),
        (lambda members: members[1].update(size=10**30), "out of range|<=|Expected `int`"),
        (lambda members: members[1].update(offset=0), f"{FACTS}: .* not between"),
        (lambda members: members[0].update(offset=-512), "`int` >= 0"),
        (lambda members: members[0].update(name="../x.safetensors"), "not the two members"),
        (lambda members: members[1].update(name="/etc/passwd"), "not the two members"),
        (lambda members: members.reverse(), "not between"),
        (lambda members: members.pop(), "does not describe 2 records"),
        (lambda members: members.clear(), "does not describe 2 records"),
        (lambda members: members[0].update(crc32="0"), "Expected `int`"),
        (lambda members: members[0].pop("sha256"), "missing required field `sha256`"),
        (lambda members: members.__setitem__(0, None), "Expected `object`, got `null`"),
    ],
)
def test_members_that_cannot_be_in_the_tar_are_named(
    folder: Path, change: Callable[[list[dict[str, object]]], object], reason: str
) -> None:
    forgery.sign_sidecar(folder, lambda fields: change(fields["members"]))
    expect_finding(folder, "shard-000000.json", "", reason)


@pytest.mark.parametrize(
    "data", [b"", b"[1]", DEEP, b'{"shard": ' + DEEP, b"{}", b"\x00", b'{"shard": {"name": "../x"}}']
)
def test_a_sidecar_of_another_form_is_named(folder: Path, data: bytes) -> None:
    forgery.sign_sidecar_bytes(folder, data)
    expect_finding(folder, "shard-000000.json", "", "is damaged or from another program")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fields: fields["shards"][0].update(records="2"), "Expected `int`, got `str`"),
        (lambda fields: fields["shards"][0].update(records=-2), "`int` >= 0"),
        (lambda fields: fields["shards"][0].update(records=10**18), "`int` <= "),
        (lambda fields: fields["shards"][0].update(name="../victim.tar"), "names a shard '../victim.tar'"),
        (lambda fields: fields["shards"][0].update(name="shard-000000.tar\n"), "names a shard"),
        (lambda fields: fields["shards"][0].update(name=None), "Expected `str`"),
        (lambda fields: fields.update(shards={}), "Expected `array`"),
        (lambda fields: fields.update(shards=[]), "the data set is empty"),
        (lambda fields: fields.update(schema="1"), "Expected `int`, got `str`"),
        (lambda fields: fields.update(schema=3), "has schema 3"),
        (lambda fields: fields.pop("schema"), "missing required field `schema`"),
        (lambda fields: fields.update(failures=None), "Expected `int`, got `null`"),
        (lambda fields: fields["spec"].update(height=33), "height=33"),
        (lambda fields: fields["spec"].update(height=True), "Expected `int`, got `bool`"),
        (lambda fields: fields.update(spec=[5, 32, 64, 8]), "Expected `object`, got `array`"),
        (lambda fields: fields["encoder"].update(text_dim=8.0), "Expected `int`, got `float`"),
        (lambda fields: fields["encoder"].pop("vae"), "missing required field `vae`"),
        (lambda fields: fields["encoder"].update(negative_prompt="\ud800"), "is damaged"),
    ],
)
def test_a_manifest_of_another_form_is_named(
    folder: Path, change: Callable[[dict[str, object]], object], reason: str
) -> None:
    forgery.sign_manifest(folder, change)
    report = verify_data_set(folder)
    assert [(one.file, one.member) for one in report.problems] == [("manifest.json", "")]
    assert re.search(reason, str(report.problems[0]))
    with pytest.raises(ValueError, match=reason):
        read_all(folder)


@pytest.mark.parametrize(("records", "rows"), [(1, 2), (3, 4), (2**40, 2**40 + 1)])
def test_counts_that_are_not_those_of_the_sidecar_are_named(folder: Path, records: int, rows: int) -> None:
    forgery.sign_manifest(folder, lambda fields: fields["shards"][0].update(records=records, rows=rows))
    with pytest.raises(ValueError, match="shard-000000.json: describes .*, the manifest"):
        open_data_set(folder).read_record(0)
    assert "describes" in str(verify_data_set(folder).problems[0])


def test_a_checksum_that_only_the_reader_looks_at_is_verified_too(folder: Path) -> None:
    forgery.sign_sidecar(folder, lambda fields: fields["members"][1].update(crc32=7))
    expect_finding(folder, "shard-000000.tar", FACTS, "hash differs")


def entry(name: str, **fields: object) -> tarfile.TarInfo:
    """An entry of a tar."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "extra",
    [
        entry("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("hard", type=tarfile.LNKTYPE, linkname="../../x"),
        entry("device", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        entry("fifo", type=tarfile.FIFOTYPE),
        entry("/absolute"),
        entry("../up"),
        entry("folder", type=tarfile.DIRTYPE),
        entry("x" * 300, pax_headers={"comment": "y" * 100_000}),
    ],
    ids=lambda info: info.name[:8],
)
@pytest.mark.parametrize("position", [0, 1, 2, 4])
def test_entries_that_the_sidecar_does_not_list_are_named(folder: Path, extra: tarfile.TarInfo, position: int) -> None:
    """The reader goes by offsets and never sees them; `tar x` would."""
    entries = forgery.read_entries(folder)
    following = "" if position == 4 else entries[position][0].name
    entries.insert(position, (extra, b""))
    forgery.sign_tar(folder, entries, listed=lambda info: info is not extra)
    expect_finding(folder, "shard-000000.tar", following, "header|after its last member", readable=True)
    read_all(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.CHRTYPE},
        {"name": "/etc/cron.d/x"},
        {"name": "other.safetensors"},
        {"size": 2**40},
        {"pax_headers": {"path": "../x"}},
        {"pax_headers": {"size": "99999999999999"}},
    ],
)
def test_a_header_that_contradicts_the_sidecar_is_named(folder: Path, fields: dict[str, object]) -> None:
    data = bytearray((folder / forgery.SHARD).read_bytes())
    forged = entry(**({"name": TENSORS, "size": 1} | fields)).tobuf(tarfile.PAX_FORMAT)
    members = json.loads((folder / forgery.SIDECAR).read_text())["members"]
    moved = len(forged) - 512
    for member in members:
        member["offset"] += moved
    forgery.sign_tar_bytes(folder, bytes(forged + data[512:]), members)
    expect_finding(folder, "shard-000000.tar", TENSORS, "header", readable=True)


def test_long_names_and_other_alphabets_are_no_problem(folder: Path) -> None:
    """A pax header before the header proper belongs to the member."""
    entries = forgery.read_entries(folder)
    for info, _ in entries:
        info.name = ("é" * 90) + info.name
    forgery.sign_tar(folder, entries)
    assert verify_data_set(folder).problems == ()


def test_nothing_of_a_stated_size_is_allocated(folder: Path) -> None:
    """Manifest, sidecar and a sparse file agree on 10 TB."""
    size = 10**13

    def enlarge(fields: dict[str, object]) -> None:
        fields["members"][3].update(size=size - fields["members"][3]["offset"])
        fields["shard"].update(size=size)

    forgery.sign_manifest(folder, lambda fields: fields["shards"][0].update(size=size))
    forgery.sign_sidecar(folder, enlarge)
    tracemalloc.start()
    assert "hash differs" in str(verify_data_set(folder).problems[0])
    with pytest.raises(ValueError, match="clip-000001.json"):
        read_all(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


FILES = [forgery.SHARD, forgery.SIDECAR, "failures.csv", "negative.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_sparse_file_of_a_terabyte_is_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(2**40)
    (problem,) = verify_data_set(folder).problems
    assert problem.file == name


@pytest.mark.parametrize(
    "data",
    [b"", header(b"[1]"), header(DEEP), save({"other": torch.zeros(2, TEXT_DIM)}), save({"text": torch.zeros(3)}),
     save({"text": torch.zeros(2, 9)}), save({"text": torch.full((2, TEXT_DIM), float("nan"))})],
)  # fmt: skip
def test_a_negative_prompt_of_another_form_is_named(folder: Path, data: bytes) -> None:
    (folder / "negative.safetensors").write_bytes(data)
    forgery.sign_manifest(folder, lambda fields: fields.update(negative_sha256=hashlib.sha256(data).hexdigest()))
    expect_finding(folder, "negative.safetensors", "", "is not an embedding|holds NaN")


def test_a_tar_that_is_no_tar_is_named(folder: Path) -> None:
    members = json.loads((folder / forgery.SIDECAR).read_text())["members"]
    data = bytearray((folder / forgery.SHARD).read_bytes())
    data[:512] = b"\xff" * 512
    forgery.sign_tar_bytes(folder, bytes(data), members)
    expect_finding(folder, "shard-000000.tar", TENSORS, "header cannot be read", readable=True)
