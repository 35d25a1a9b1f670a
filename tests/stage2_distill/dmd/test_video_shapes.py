"""Shapes of samples: lengths by their weights, and micro-batches of one shape on any number of ranks."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.video import VideoSpec
from stage2_distill.checkpointing.identity import recipe_differences
from stage2_distill.config import DistillConfig, LengthShare, parse_lengths
from stage2_distill.dmd.schedule import MicroBatch, Schedule
from stage2_distill.dmd.video_shapes import SampleShapes, pack_samples

SIZES = [VideoSpec(9, *size) for size in ((64, 96), (96, 64), (64, 64), (32, 160))]
LENGTHS = (9, "9,17", "9:0.3,13:0.7", "9,13,17:8")


def config(**changes: object) -> DistillConfig:
    return replace(DistillConfig(shards=("d",), model="m", out="o", iterations=3, student_update_interval=2), **changes)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int, SampleShapes]:
    """World, batch size, global batch, and shapes of records of any mix of sizes."""
    world, batch_size, count = (draw(st.integers(1, top)) for top in (5, 4, 4))
    record_sizes = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=30))
    lengths = parse_lengths(draw(st.sampled_from(LENGTHS)))
    shapes = SampleShapes(draw(st.integers(0, 9)), lengths, lambda position: record_sizes[position % len(record_sizes)])
    return world, batch_size, world * batch_size * count, shapes


def all_parts(world: int, batch_size: int, global_batch: int, shapes: SampleShapes) -> list[list[MicroBatch]]:
    """The micro-batches of each rank."""
    schedule = Schedule.of(config(batch_size=batch_size, global_batch=global_batch), world)
    return [list(schedule.micro_batches(start=0, rank=rank, shapes=shapes)) for rank in range(world)]


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_sample_is_in_one_micro_batch_of_its_shape(run: tuple[int, int, int, SampleShapes]) -> None:
    world, batch_size, global_batch, shapes = run
    ranks = all_parts(*run)
    # The ranks of a sharded network compute together: they have equally many micro-batches, which end together.
    assert len({tuple((p.iteration, p.role, p.step, p.last) for p in parts) for parts in ranks}) == 1
    taken: dict[tuple[int, str], Counter[int]] = {}
    shares: Counter[tuple[int, str]] = Counter()
    for part in (part for parts in ranks for part in parts):
        assert 1 <= len(part.samples) <= batch_size
        assert part.share == len(part.samples) * world / global_batch
        for sample, position in zip(part.samples, part.positions, strict=True):
            assert part.spec == shapes.sample_spec(part.iteration, part.role, sample, position)
        taken.setdefault((part.iteration, part.role), Counter()).update(part.samples)
        shares[part.iteration, part.role] += part.share / world
    assert set(taken) == {(0, "student"), (0, "critic"), (1, "critic"), (2, "student"), (2, "critic")}
    assert all(samples == Counter(range(global_batch)) for samples in taken.values())
    assert all(share == pytest.approx(1) for share in shares.values())
    assert sorted(pos for parts in ranks for p in parts for pos in p.positions) == list(range(5 * global_batch))


@settings(max_examples=60, deadline=None)
@given(runs())
def test_samples_and_shapes_do_not_depend_on_ranks_or_batch_size(run: tuple[int, int, int, SampleShapes]) -> None:
    world, batch_size, global_batch, shapes = run

    def samples(ranks: list[list[MicroBatch]]) -> set[tuple[int, str, int, int, VideoSpec]]:
        return {
            (part.iteration, part.role, sample, position, part.spec)
            for parts in ranks
            for part in parts
            for sample, position in zip(part.samples, part.positions, strict=True)
        }

    assert samples(all_parts(*run)) == samples(all_parts(1, 1, global_batch, shapes))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_one_shape_is_split_as_it_always_was(world: int, batch_size: int, count: int) -> None:
    packed = pack_samples([VideoSpec()] * (world * batch_size * count), batch_size=batch_size, world=world)
    assert packed == [
        tuple(range(start, start + batch_size)) for start in range(0, len(packed) * batch_size, batch_size)
    ]
    assert len(packed) == world * count


def test_large_shapes_come_first_and_as_few_micro_batches_as_the_ranks_allow() -> None:
    wide, small = VideoSpec(9, 64, 96), VideoSpec(9, 64, 64)
    assert pack_samples([small, wide, small, wide], batch_size=2, world=1) == [(1, 3), (0, 2)]
    assert pack_samples([small, small, small, wide], batch_size=2, world=2) == [(3,), (0,), (1,), (2,)]
    assert pack_samples([wide, small, small, small, small, small], batch_size=3, world=2) == [
        (0,), (1,), (2, 3), (4, 5)
    ]  # fmt: skip


def test_lengths_have_their_weights_and_depend_on_seed_iteration_role_and_sample() -> None:
    shapes = SampleShapes(3, parse_lengths("81:0.3,121:0.7"), lambda position: VideoSpec())
    drawn = Counter(
        shapes.draw_length(n, role, sample)
        for n in range(25)
        for role in ("student", "critic")
        for sample in range(100)
    )
    assert set(drawn) == {81, 121} and abs(drawn[81] - 1500) < 100  # 3 standard deviations are 97
    keys = [(0, "student", 0), (1, "student", 0), (0, "critic", 0), (0, "student", 1)]
    columns = {tuple(replace(shapes, seed=seed).draw_length(*key) for seed in range(50)) for key in keys}
    assert len(columns) == len(keys)
    other_order = SampleShapes(3, parse_lengths("121:7,81:3"), lambda position: VideoSpec())
    assert all(shapes.draw_length(0, "critic", n) == other_order.draw_length(0, "critic", n) for n in range(100))
    assert shapes.sample_spec(0, "critic", 5, 0).num_frames == shapes.draw_length(0, "critic", 5)


@pytest.mark.parametrize(
    ("value", "lengths"),
    [
        (121, [(121, 1)]),
        ("121", [(121, 1)]),
        ("121,81", [(81, 0.5), (121, 0.5)]),
        ("81:0.3,121:0.7", [(81, 0.3), (121, 0.7)]),
        ("81:1, 121:3", [(81, 0.25), (121, 0.75)]),
    ],
)
def test_lengths_are_parsed(value: int | str, lengths: list[tuple[int, float]]) -> None:
    assert parse_lengths(value) == tuple(LengthShare(*length) for length in lengths)
    assert config(num_frames=value).spec == VideoSpec(lengths[-1][0])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("81,120", "num_frames=120: the VAE needs 4k.1 frames; nearest are 117 and 121"),
        ("1,81", "num_frames=1: must be at least 5"),
        (1, "num_frames=1: must be at least 5"),
        ("81,", "num_frames=81,: must be numbers of frames, such as 81,121"),
        ("81:a,121", "num_frames=81:a,121: must be numbers"),
        ("", "num_frames=: must be numbers"),
        ("81,81", "names 81 twice"),
        ("81:0,121", "the weight of 81 is 0; give a number above 0"),
        ("81:nan,121", "the weight of 81 is nan"),
        ("81:inf,121", "the weight of 81 is inf"),
        (81.5, "num_frames=81.5: must be int . str"),
        (True, "num_frames=True: must be int . str"),
    ],
)
def test_bad_lengths_are_refused(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config(num_frames=value)


def test_reuse_of_rollouts_needs_micro_batches_of_one_if_shapes_differ() -> None:
    assert config(num_frames="81,121", rollout_reuse=True).batch_size == 1
    with pytest.raises(ValueError, match="batch_size=2: rollout_reuse and videos of several"):
        config(num_frames="81,121", rollout_reuse=True, batch_size=2)


def test_the_same_lengths_in_another_order_are_the_same_run() -> None:
    def differences(before: object, now: object) -> list[str]:
        return recipe_differences(vars(config(num_frames=before)), config(num_frames=now))

    assert differences("81,121", "121:1,81:1.0") == differences(121, "121") == differences("121", 121) == []
    assert differences("81,121", "81:2,121") == ["num_frames: '81:2,121', was '81,121'"]
    assert differences(121, "81,121") == ["num_frames: '81,121', was 121"]
