"""Data sets of several sizes: what their manifest says, and which records have which size."""

from dataclasses import replace

import pytest

from shards.dataset import SizeGroup, open_data_set
from shards.manifest import MANIFEST_FILE, Manifest, ShardInfo, make_manifest, read_manifest
from shards.mixture import DataSetMixture, open_data_sets
from shards.verification.verify import verify_data_set
from tests.shards.data_sets import ENCODER, SPEC, make_data_set, make_many_size_set, make_record
from tests.shards.forgery import sign_manifest, sign_sidecar

WIDE, TALL, SQUARE = (32, 64), (64, 32), (64, 64)
SHARDS = [(TALL, 3), (TALL, 2), (WIDE, 4), (SQUARE, 0), (TALL, 1), (WIDE, 2)]


def spec_of(size):
    return replace(SPEC, height=size[0], width=size[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_many_size_set(tmp_path_factory.mktemp("sizes") / "data", SHARDS)


def test_the_manifest_states_the_size_of_each_shard(folder):
    manifest = read_manifest(folder)
    assert manifest.schema == 2 and manifest.spec == spec_of(WIDE)
    assert manifest.sizes == (spec_of(WIDE), spec_of(TALL))  # no record is square
    assert [manifest.shard_spec(shard) for shard in manifest.shards] == [spec_of(size) for size, _ in SHARDS]
    assert verify_data_set(folder).problems == ()


def test_records_of_a_size_lie_in_ranges(folder):
    data = open_data_set(folder)
    wide, tall = data.size_groups
    assert wide == SizeGroup(spec_of(WIDE), (range(5, 9), range(10, 12)))
    assert tall == SizeGroup(spec_of(TALL), (range(5), range(9, 10)))
    assert [wide.record_index(index) for index in range(wide.num_records)] == [5, 6, 7, 8, 10, 11]
    assert [tall.record_index(index) for index in range(6)] == [0, 1, 2, 3, 4, 9]
    for group in data.size_groups:
        for index in range(group.num_records):
            number = group.record_index(index)
            expected = make_record(number, spec=group.spec)
            record = data.read_record(number)
            assert record.key == expected.key and record.first_frame.equal(expected.first_frame)
        for outside in (-1, group.num_records):
            with pytest.raises(IndexError, match=f"record {outside} of {group.num_records}"):
                group.record_index(outside)


def test_one_size_is_written_as_schema_1(tmp_path):
    same = make_many_size_set(tmp_path / "same", [(TALL, 2), (WIDE, 0), (TALL, 1)])
    manifest = read_manifest(same)
    assert (manifest.schema, manifest.spec, manifest.sizes) == (1, spec_of(TALL), (spec_of(TALL),))
    assert open_data_set(same).size_groups == (SizeGroup(spec_of(TALL), (range(3),)),)
    plain = make_data_set(tmp_path / "plain", [2, 1])
    assert "video_size" not in (plain / MANIFEST_FILE).read_text() + (plain / "shard-000000.json").read_text()
    assert open_data_set(plain).size_groups == (SizeGroup(SPEC, (range(3),)),)


def test_a_manifest_without_records_has_its_own_size():
    empty = ShardInfo("shard-000000.tar", 0, 1, "", 0, video_size=TALL)
    assert make_manifest(SPEC, ENCODER, (empty,), 1) == Manifest(1, SPEC, ENCODER, (empty,), 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda fields: fields.update(schema=1), "has schema 1 and records of several sizes"),
        (lambda fields: fields["shards"][0].update(video_size=[33, 64]), "height=33: must be a multiple of 32"),
        (lambda fields: fields["shards"][0].update(video_size=[64]), "Expected `array` of length 2"),
    ],
)
def test_a_forged_size_is_refused(tmp_path, change, problem):
    forged = make_many_size_set(tmp_path / "data", SHARDS)
    sign_manifest(forged, change)
    with pytest.raises(ValueError, match=problem):
        open_data_set(forged)


def test_records_of_another_size_than_their_shards_are_refused(tmp_path):
    folder = make_many_size_set(tmp_path / "data", SHARDS)

    sign_sidecar(folder, lambda fields: fields["shard"].update(video_size=SQUARE))
    with pytest.raises(ValueError, match=r"shard-000000.json: describes ShardInfo"):
        open_data_set(folder).read_record(0)
    sign_manifest(folder, lambda fields: fields["shards"][0].update(video_size=SQUARE))
    with pytest.raises(ValueError, match=r"first_frame is \(48, 1, 4, 2\).*expected \(48, 1, 4, 4\)"):
        open_data_set(folder).read_record(0)
    assert "expected (48, 1, 4, 4)" in str(verify_data_set(folder).problems[0])


def test_mixtures_allow_other_sizes_only_where_they_are_meant(tmp_path, folder):
    plain = make_data_set(tmp_path / "plain", [3], name="plain")
    tall = make_data_set(tmp_path / "tall", [2], spec=spec_of(TALL), name="tall")
    with pytest.raises(ValueError, match="cannot be mixed with .*: height: 64, expected 32; width: 32, expected 64"):
        open_data_sets([str(plain), str(tall)])
    with pytest.raises(ValueError, match="cannot be mixed with .*: one of them holds several sizes"):
        open_data_sets([str(plain), str(folder)])
    mixed = open_data_sets([str(plain), f"{tall}:0.5", str(folder)], many_sizes=True)
    wide_group, tall_group = mixed.size_groups
    assert wide_group == SizeGroup(spec_of(WIDE), (range(3), range(10, 14), range(15, 17)))
    assert tall_group == SizeGroup(spec_of(TALL), (range(3, 5), range(5, 10), range(14, 15)))
    for group in mixed.size_groups:
        for own in group.ranges:
            assert mixed.read_record(own[0]).first_frame.shape == group.spec.first_frame_shape
    other = make_data_set(tmp_path / "other", [3], encoder=replace(ENCODER, vae="another"))
    with pytest.raises(ValueError, match="cannot be mixed with .*: vae: 'another'"):
        DataSetMixture([open_data_set(plain), open_data_set(other)], [1, 1], many_sizes=True)
