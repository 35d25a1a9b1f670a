import random
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from safetensors.torch import load

from shards.dataset import DataSet, open_data_set, prefetch_ordered
from shards.mixture import RecordStream
from shards.record import group_by_first_frame, parse_tensors, to_members
from shards.shuffle import permute_index
from tests.shards.data_sets import make_data_set, make_record

PINNED, PINNED_LARGE = [5, 1, 0, 4, 6, 9, 3, 2, 8, 7], 47_609_603


def random_runs(seed, number):
    """Random sizes, ranks, batch sizes and stop points."""
    generator = random.Random(seed)
    for _ in range(number):
        per_rank, accumulation = generator.randint(1, 4), generator.randint(1, 3)
        yield (
            generator.randint(1, 300),
            generator.randint(1, 9),
            per_rank * accumulation,
            generator.randint(0, 40),
            generator.randint(0, 99),
        )


class SizedDataSet:
    """A data set without records, for tests that need its size only."""

    record_index = DataSet.record_index

    def __init__(self, num_records):
        self.num_records = num_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("data"), [5, 1, 8, 3])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 1000])
def test_order_is_a_bijection(count):
    for epoch in range(3):
        assert sorted(permute_index(i, count=count, seed=7, epoch=epoch) for i in range(count)) == list(range(count))


def test_order_is_fair():
    counts = Counter(tuple(permute_index(i, count=4, seed=seed, epoch=0) for i in range(4)) for seed in range(4800))
    assert set(counts) == set(permutations(range(4)))
    assert min(counts.values()) > 130 and max(counts.values()) < 270  # 200 each, five standard deviations


def test_order_is_pinned():
    """Another order would break every run that resumes, and every reader written from docs/format.md."""
    assert [permute_index(i, count=10, seed=1, epoch=2) for i in range(10)] == PINNED
    assert permute_index(12_345_678, count=100_000_000, seed=0, epoch=0) == PINNED_LARGE


def test_neighbours_are_scattered():
    count = 10_000
    order = [permute_index(i, count=count, seed=0, epoch=0) for i in range(count)]
    steps = [abs(a - b) for a, b in zip(order, order[1:], strict=False)]
    assert sum(steps) / len(steps) == pytest.approx(count / 3, rel=0.03)  # of two independent uniform draws
    assert sum(a == b for a, b in zip(order, range(count), strict=True)) < 8  # one is expected


def test_epochs_and_seeds_differ():
    orders = {
        tuple(RecordStream(SizedDataSet(50), seed=s).record_index(e * 50 + i) for i in range(50))
        for s in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_every_record_once_an_epoch_over_all_ranks():
    for records, world, per_rank, _, seed in random_runs(1, 60):
        stream, size = RecordStream(SizedDataSet(records), seed=seed), world * per_rank
        updates = -(-2 * records // size)
        read = Counter()
        for rank in range(world):
            own = [u * size + i for u in range(updates) for i in range(size) if i % world == rank]
            read.update((p // records, stream.record_index(p)) for p in own if p < 2 * records)
        assert read == Counter((epoch, index) for epoch in (0, 1) for index in range(records))


def test_an_update_reads_the_same_set_on_any_number_of_ranks_and_after_any_stop():
    for records, world, per_rank, stop, seed in random_runs(2, 60):
        size = 12 * per_rank
        all_indices = [RecordStream(SizedDataSet(records), seed=seed).record_index(p) for p in range(size * (stop + 2))]
        for ranks in {w for w in (1, 2, 3, 4, 6, 12) if w <= max(1, world)}:
            resumed = RecordStream(SizedDataSet(records), seed=seed)
            update = [
                resumed.record_index(stop * size + i) for r in range(ranks) for i in range(size) if i % ranks == r
            ]
            assert sorted(update) == sorted(all_indices[stop * size : (stop + 1) * size])


def test_records_come_back_as_written(folder):
    data = open_data_set(folder)
    assert data.num_records == data.manifest.records == 17
    for index in (0, 4, 5, 6, 16):
        record, expected = data.read_record(index), make_record(index)
        assert (record.key, record.source) == (expected.key, expected.source)
        assert torch.equal(record.first_frame, expected.first_frame) and torch.equal(record.text, expected.text)
    assert data.negative.shape == (4, 8)
    for outside in (-1, 17):
        with pytest.raises(IndexError, match=f"record {outside} of 17"):
            data.read_record(outside)


def test_tensors_are_those_of_the_safetensors_library(folder):
    """`parse_tensors` takes the bytes apart itself, to copy nothing."""
    data = to_members(make_record(3))["clip-000003.safetensors"]
    loaded, ours = load(data), dict(zip(("text", "first_frame"), parse_tensors(data), strict=True))
    assert set(loaded) == {"first_frame", "text"}
    assert all(torch.equal(loaded[name], ours[name]) and loaded[name].dtype == ours[name].dtype for name in ours)
    buffer = bytearray(data)
    parse_tensors(memoryview(buffer))[0].zero_()
    assert bytes(buffer) != data, "a writable buffer becomes the tensors"
    for broken in (data[:-2], data[:100], b"", data.replace(b"[3,", b"[4,", 1).replace(b"[6,", b"[7,", 1)):
        with pytest.raises(ValueError, match="header|bytes"):
            parse_tensors(broken)


def test_a_tar_cut_short_is_named(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    data, tar = open_data_set(cut), cut / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:1600])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: damaged at clip-"):
        for index in range(17):
            data.read_record(index)
    assert bytes(data.storage.read(tar.name, 0, 2000)) == tar.read_bytes()  # without what was in memory before


def test_batch_is_collated_in_the_order_of_positions(folder):
    stream = RecordStream(open_data_set(folder), seed=3)
    batch = stream.read_batch([20, 4, 33])
    expected = [make_record(stream.record_index(position)) for position in (20, 4, 33)]
    assert torch.equal(batch.first_frame, torch.stack([record.first_frame for record in expected]))
    assert batch.text.shape == (3, 512, 8) and not batch.text[0, len(expected[0].text) :].any()


def test_sidecars_are_read_when_first_touched_and_only_a_bounded_number_is_held(folder, monkeypatch):
    monkeypatch.setattr("shards.dataset.MAX_CACHED_RECORDS", 9)  # of 17 records in 4 shards: two shards
    data, read = open_data_set(folder), []
    inner = data.storage.read
    monkeypatch.setattr(data.storage, "read", lambda name, *a, **k: (read.append(name), inner(name, *a, **k))[1])
    for index in (0, 1, 5, 0, 6, 0, 5):
        data.read_record(index)
    sidecars = [name for name in read if name.endswith(".json")]
    assert sidecars == [f"shard-00000{n}.json" for n in (0, 1, 2, 1)]


def test_threads_read_what_one_reads(folder):
    stream = RecordStream(open_data_set(folder), seed=0)
    plans = [[p, p + 1] for p in range(0, 60, 2)]
    batches = list(prefetch_ordered(stream.read_batch, plans, depth=4, threads=3))
    assert len(batches) == len(plans)
    for batch, plan in zip(batches, plans, strict=True):
        assert torch.equal(batch.first_frame, stream.read_batch(plan).first_frame)


def test_prefetch_is_ordered_and_bounded():
    running, most, lock = 0, 0, threading.Lock()
    started = []

    def load(item):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            started.append(item)
        time.sleep(0.002 * (item % 3))
        with lock:
            running -= 1
        return item * item

    for taken, value in enumerate(prefetch_ordered(load, range(40), depth=5, threads=3)):
        assert value == taken * taken
        assert max(started) <= taken + 5
    assert 1 < most <= 3


def test_prefetch_surfaces_errors_in_their_place():
    items = prefetch_ordered(lambda x: 6 // (3 - x), range(9), depth=4, threads=2)
    assert [next(items), next(items), next(items)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(items)


@pytest.mark.parametrize("missing", ["manifest.json", "negative.safetensors"])
def test_an_unfinished_data_set_is_refused(tmp_path, missing):
    folder = make_data_set(tmp_path / "data", [2])
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"unfinished.*{missing}"):
        open_data_set(folder)


def test_batches_never_mix_records_with_and_without_a_first_frame():
    records = [replace(make_record(i), first_frame=None) if i in (1, 4) else make_record(i) for i in range(6)]
    assert group_by_first_frame(records, 3) == [[0, 2, 3], [5], [1, 4]]
    assert group_by_first_frame(records, 1) == [[0], [2], [3], [5], [1], [4]]
