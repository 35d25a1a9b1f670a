import random
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch

from shards.manifest import read_manifest, read_negative_embedding, write_manifest
from shards.verification.verify import broken_shard_names, delete_broken_files, verify_data_set
from shards.writer import read_index, shard_file_name, write_shard
from tests.shards.data_sets import FAILURE, TEXT_DIM, make_data_set, make_record, make_shards
from tests.shards.forgery import sign_manifest
from tests.shards.server import serve

FAILURES_CSV = f"line,path,reason\n{FAILURE.line},{FAILURE.path},{FAILURE.reason}\n"


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory):
    folder = make_data_set(tmp_path_factory.mktemp("clean") / "data", [4, 3])
    (folder / "failures.csv").write_text(FAILURES_CSV)
    return folder


@pytest.fixture
def folder(clean_folder, tmp_path):
    return shutil.copytree(clean_folder, tmp_path / "data")


def problem_places(report):
    return {(problem.file, problem.member) for problem in report.problems}


def flip_bit(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def member_at(path, position):
    """The member of a tar that a byte belongs to; "" for a byte outside of the members' data."""
    if path.suffix != ".tar":
        return None
    with tarfile.open(path) as tar:
        inside = (info.name for info in tar if 0 <= position - info.offset_data < info.size)
        return next(inside, "")


def test_a_sound_data_set_has_no_problems_and_is_described(clean_folder):
    report = verify_data_set(clean_folder)
    assert report.problems == () and report.outliers == ()
    assert report.manifest.records == 7 and report.sources == {"mp4 128x72": 7}
    rows = [len(make_record(number).text) for number in range(7)]
    assert (report.value_summaries["text rows"].low, report.value_summaries["text rows"].high) == (min(rows), max(rows))
    frames = [make_record(number).first_frame.double().square().mean().sqrt().item() for number in range(7)]
    assert report.value_summaries["first frame rms"].mean == pytest.approx(sum(frames) / 7, rel=1e-5)
    assert report.value_summaries["prompt characters"].median == len("prompt 3 é")
    assert "7 records + 1 failures = 8 rows in 2 shards" in "\n".join(report.format_lines())


def test_any_flipped_bit_is_found_and_named(folder):
    generator = random.Random(1)
    paths = sorted(folder.iterdir())
    positions = [
        (path, generator.randrange(path.stat().st_size), generator.randrange(8)) for path in paths for _ in range(40)
    ]
    tar = folder / shard_file_name(0)
    positions += [(tar, position, generator.randrange(8)) for position in range(0, 512, 2)]  # a header
    assert len(positions) == 40 * 7 + 256
    for path, position, bit in positions:
        expected = member_at(path, position)
        flip_bit(path, position, bit)
        report = verify_data_set(folder)
        assert [problem.file for problem in report.problems] == [path.name], (path.name, position, bit)
        if expected is not None:
            assert report.problems[0].member == expected, (path.name, position, bit, report.problems)
        flip_bit(path, position, bit)
    assert verify_data_set(folder).problems == ()


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("shard-000001.tar", 5000, "hash differs"),
        ("shard-000001.tar", -600, "hash differs, outside of the data of its members"),
        ("shard-000001.tar", None, "missing"),
        ("shard-000001.json", 500, "damaged"),
        ("shard-000001.json", None, "missing"),
        ("negative.safetensors", 50, "damaged"),
        ("negative.safetensors", None, "No such file"),
        ("manifest.json", 300, "damaged"),
    ],
)
def test_what_is_missing_or_cut_short_is_named(folder, name, keep, message):
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if keep is not None:
        (folder / name).write_bytes(data[:keep])
    report = verify_data_set(folder)
    assert {problem.file for problem in report.problems} == {name} and message in str(report.problems[0])


def test_bytes_behind_the_end_are_found(folder):
    with (folder / "shard-000000.tar").open("ab") as file:
        file.write(b"more")
    assert problem_places(verify_data_set(folder)) == {("shard-000000.tar", "")}


def test_there_must_be_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="does not exist or is unfinished"):
        verify_data_set(tmp_path / "nothing")


def rewrite_second_shard(folder, change, **manifest):
    """Write the second shard again with other records and correct hashes, and verify the data set."""
    records = change([make_record(number) for number in range(4, 7)])
    index = write_shard(folder, shard_file_name(1), records, failures=[], rows_sha256="0" * 64)
    before = read_manifest(folder)
    shards = (before.shards[0], index.shard)
    write_manifest(folder, replace(before, shards=shards, **manifest), read_negative_embedding(folder))
    return verify_data_set(folder)


def change_first(**fields):
    return lambda records: [replace(records[0], **fields), *records[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_first(text=torch.full((2, TEXT_DIM), float("nan"))), "text holds NaN"),
        (change_first(first_frame=torch.full((48, 1, 2, 4), float("inf"))), "first_frame holds NaN or infinity"),
        (change_first(first_frame=torch.zeros(48, 1, 4, 2)), r"first_frame is \(48, 1, 4, 2\)"),
        (change_first(text=torch.ones(513, TEXT_DIM)), r"text is \(513, 8\)"),
        (change_first(text=torch.ones(2, TEXT_DIM + 1)), r"text is \(2, 9\)"),
        (change_first(source=replace(make_record(4).source, prompt=" ")), "the prompt is empty"),
        (change_first(key="../clip"), "key '../clip': holds a path"),
        (change_first(key="clip-000006"), "this key is also in shard-000001.tar"),
        (change_first(key="clip-000000"), "this key is also in shard-000000.tar"),
        (change_first(source=replace(make_record(4).source, line=8)), "lines 8 to 9 are not 3 rows"),
        (change_first(source=replace(make_record(4).source, line=4)), "lines 4 to 9 are not 3 rows"),
    ],
)
def test_what_breaks_the_rules_is_found_under_right_hashes(folder, change, message):
    report = rewrite_second_shard(folder, change)
    assert len(report.problems) == 1 and broken_shard_names(report) == ["shard-000001.tar"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(report.problems[0])


def test_a_wrong_count_of_failures_is_found(folder):
    assert "counts 2 failures, the sidecars 1" in str(rewrite_second_shard(folder, list, failures=2).problems[0])


def test_outliers_are_shown_but_not_broken(folder):
    report = rewrite_second_shard(folder, change_first(first_frame=100 * make_record(4).first_frame))
    assert report.problems == ()
    assert [(item.file, item.member, item.reason.split()[0]) for item in report.outliers] == [
        ("shard-000001.tar", "clip-000004", "first_frame")
    ]
    assert "outlier: shard-000001.tar: clip-000004: first_frame has an rms of" in "\n".join(report.format_lines())


def test_a_shard_that_the_manifest_does_not_know_is_named(folder):
    (folder / "shard-000002.tar").write_bytes(b"")
    for name in ("shard-000002.tar.partial", "shard-notes.txt", "shard-2.tar", "shard-000002.txt"):
        (folder / name).write_bytes(b"")
    assert problem_places(verify_data_set(folder)) == {("shard-000002.tar", "")}


def test_a_manifest_of_a_newer_schema_says_so_whatever_its_shards_have(folder):
    sign_manifest(folder, lambda fields: fields.update(schema=3, shards=[{"codec": "zstd"}]))
    with pytest.raises(ValueError, match=r"has schema 3, this version reads only 1 and 2; use the version that"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../victim.txt", "victim.tar", "shard-000001.tar/../../victim.txt"])
def test_a_manifest_that_names_another_file_is_refused_and_the_file_left(folder, name):
    (folder.parent / "victim.txt").write_text("mine")
    sign_manifest(folder, lambda fields: fields["shards"][1].update(name=name))
    report = verify_data_set(folder)
    assert problem_places(report) == {("manifest.json", "")} and f"names a shard '{name}'" in str(report.problems[0])
    assert delete_broken_files(report) == ["manifest.json"]
    assert (folder.parent / "victim.txt").read_text() == "mine"


def test_repair_takes_away_just_what_is_broken(folder, clean_folder):
    flip_bit(folder / "shard-000001.tar", 3000, 2)
    (folder / "failures.csv").write_text("line,path,reason\n")
    flip_bit(folder / "negative.safetensors", 90, 1)
    report = verify_data_set(folder)
    assert broken_shard_names(report) == ["shard-000001.tar"]
    deleted = ["manifest.json", "negative.safetensors", "shard-000001.json", "shard-000001.tar"]
    assert delete_broken_files(report) == deleted
    left = {path.name for path in folder.iterdir()}
    assert left == {"failures.csv", "shard-000000.json", "shard-000000.tar"}
    make_shards(folder, [4, 3])
    assert all((folder / name).read_bytes() == (clean_folder / name).read_bytes() for name in deleted[2:])
    assert read_index(folder, "shard-000001.tar").shard == read_manifest(clean_folder).shards[1]


def test_an_object_store_is_verified_and_not_repaired(folder):
    with serve(folder) as server:
        assert verify_data_set(server.url).problems == ()
        server.fault = lambda name, number: "flip" if number == 1 and name != "failures.csv" else ""  # passes
        server.asked.clear()
        assert verify_data_set(server.url).problems == ()
        flip_bit(folder / "shard-000000.tar", 700, 0)
        server.fault = lambda name, number: ""
        report = verify_data_set(server.url)
        assert problem_places(report) == {("shard-000000.tar", "clip-000000.safetensors")}
        with pytest.raises(ValueError, match="only a local folder is repaired"):
            delete_broken_files(report)
