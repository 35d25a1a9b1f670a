from collections import Counter
from dataclasses import replace

import pytest
import torch

from common.video import VideoSpec
from shards.dataset import DataSet, open_data_set
from shards.mixture import DataSetMixture, RecordStream, open_data_sets, parse_weight
from tests.shards.data_sets import ENCODER, make_data_set, make_record


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix")
    return [
        str(make_data_set(root / name, counts, name=name))
        for name, counts in (("a", [7, 4]), ("b", [5]), ("c", [2, 1]))
    ]


def open_mixture(folders, *weights):
    return DataSetMixture([open_data_set(folder) for folder in folders], weights)


@pytest.mark.parametrize(
    ("text", "prefix", "weight"),
    [
        ("a/b", "a/b", 1),
        ("a/b:0.3", "a/b", 0.3),
        ("a:2", "a", 2),
        ("a:1e-2", "a", 0.01),
        ("s3://bucket:0.5", "s3://bucket:0.5", 1),
        ("https://host:8000", "https://host:8000", 1),
        ("https://host:8000/data", "https://host:8000/data", 1),
        ("https://host:8000/data:0.25", "https://host:8000/data", 0.25),
        ("C:/data", "C:/data", 1),
    ],
)
def test_weights_are_parsed(text, prefix, weight):
    assert parse_weight(text) == (prefix, weight)


def test_a_folder_whose_name_ends_like_a_weight_is_a_folder(tmp_path):
    named = make_data_set(tmp_path / "out-12:30", [2])
    assert parse_weight(str(named)) == (str(named), 1)
    assert parse_weight(f"{named}:0.5") == (str(named), 0.5)
    assert open_data_sets([str(named)]).num_records == 2
    make_data_set(tmp_path / "out-12", [1])  # now 30 is the weight of this one
    assert parse_weight(str(named)) == (str(tmp_path / "out-12"), 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0", "between 1/1000"),
        ("a:-1", "between 1/1000"),
        ("a:1001", "and 1000"),
        ("a:1.2.3", "is not a number"),
        ("a:nan", "the weight is nan; give a finite number"),
        ("s3://bucket/a:NaN", "the weight is nan; give a finite number"),
        ("a:-inf", "the weight is -inf; give a finite number"),
        ("a:Infinity", "the weight is inf; give a finite number"),
    ],
)
def test_bad_weights_are_refused(text, message):
    with pytest.raises(ValueError, match=f"shards={text}: .*{message}"):
        parse_weight(text)


@pytest.mark.parametrize(("weights", "shares"), [((1, 0.3, 0.5), (10, 3, 5)), ((2, 2, 4), (1, 1, 2))])
def test_every_cycle_has_the_exact_shares(folders, weights, shares):
    mixed = open_mixture(folders, *weights)
    assert mixed.draws_per_cycle == shares and mixed.num_records == 19
    owner = [0] * 11 + [1] * 5 + [2] * 3
    size = sum(shares)
    cycles = []
    for cycle in range(30):
        drawn_indices = [owner[mixed.record_index(cycle * size + i, seed=1)] for i in range(size)]
        assert tuple(drawn_indices.count(number) for number in range(3)) == shares
        cycles.append(tuple(drawn_indices))
    assert len(set(cycles)) > 5  # every cycle has its own order


def test_each_data_set_goes_round_exactly(folders):
    mixed = open_mixture(folders, 1, 0.3, 0.5)
    drawn_indices = [mixed.record_index(position, seed=4) for position in range(18 * 33)]
    for low, high in ((0, 11), (11, 16), (16, 19)):
        own_indices = [index for index in drawn_indices if low <= index < high]
        rounds = [
            own_indices[i : i + high - low]
            for i in range(0, len(own_indices) // (high - low) * (high - low), high - low)
        ]
        uneven_rounds = sum(Counter(part) != Counter(range(low, high)) for part in rounds)
        assert uneven_rounds == 0, (low, uneven_rounds)
        assert len({tuple(part) for part in rounds}) > 1


def test_any_rank_reads_its_part_after_any_stop(folders):
    all_indices = [RecordStream(open_mixture(folders, 1, 0.3, 0.5), seed=2).record_index(p) for p in range(240)]
    for world in (1, 2, 3, 4):
        resumed = RecordStream(open_mixture(folders, 1, 0.3, 0.5), seed=2)
        update = [resumed.record_index(108 + i) for rank in range(world) for i in range(12) if i % world == rank]
        assert sorted(update) == sorted(all_indices[108:120])
    assert all_indices != [RecordStream(open_mixture(folders, 1, 0.3, 0.5), seed=3).record_index(p) for p in range(240)]


def test_records_come_from_their_own_data_set(folders):
    data = open_data_sets([folders[0], folders[1] + ":0.3", folders[2] + ":0.5"])
    stream = RecordStream(data, seed=0)
    batch = stream.read_batch(range(40))
    keys = [data.read_record(stream.record_index(position)).key for position in range(40)]
    for position, key in enumerate(keys):
        name, number = key.split("-")
        expected = make_record(int(number), name=name)
        assert torch.equal(batch.first_frame[position], expected.first_frame)
    assert {key[0] for key in keys} == {"a", "b", "c"}
    assert data.manifest.spec == open_data_set(folders[0]).manifest.spec and data.negative.shape == (4, 8)
    with pytest.raises(IndexError, match="record 19 of 19"):
        data.read_record(19)


def test_one_data_set_is_itself(folders):
    assert isinstance(open_data_sets([folders[0] + ":0.5"]), DataSet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": replace(ENCODER, vae="other")}, "vae: 'other', expected 'vae'"),
        ({"spec": VideoSpec(5, 64, 64, 8)}, "height: 64, expected 32"),
    ],
)
def test_other_encodings_are_not_mixed(folders, tmp_path, change, message):
    other = make_data_set(tmp_path / "other", [2], **change)
    with pytest.raises(ValueError, match=f"other: cannot be mixed with .*: .*{message}"):
        open_data_sets([folders[0], str(other)])
