"""Rows -> sizes -> shards."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from common.video import FrameSize
from stage1_encode.media.first_frame import FirstFrame
from stage1_encode.media.rows import Row, read_csv_rows, read_shard_rows, rows_digest
from stage1_encode.video_sizes.row_sizes import assign_size, group_rows, size_problem

WIDE, SQUARE, TALL = SIZES = (FrameSize(64, 96), FrameSize(64, 64), FrameSize(96, 64))
ROW = Row(0, 2, "a.mp4", "a", None, "")


def sized_row(number: int, size: FrameSize | None) -> Row:
    return replace(ROW, number=number, line=number + 2, video_size=size)


@pytest.mark.parametrize(
    ("row", "shape", "size", "problem"),
    [
        (ROW, (1080, 1920), WIDE, ""),
        (ROW, (1920, 1080), TALL, ""),
        (ROW, None, WIDE, ""),  # cannot be read, or a text alone
        (replace(ROW, shape=(500, 490)), (1080, 1920), SQUARE, ""),  # the CSV counts
        (replace(ROW, video_size=TALL, has_own_size=True), (1080, 1920), TALL, ""),
        (
            replace(ROW, video_size=FrameSize(32, 32), has_own_size=True),
            None,
            WIDE,
            "size 32x32 is none of 64x96,64x64,96x64",
        ),
    ],
)
def test_a_row_gets_its_own_size_or_the_nearest(
    row: Row, shape: tuple[int, int] | None, size: FrameSize, problem: str
) -> None:
    assigned = assign_size(row, SIZES, shape)
    assert (assigned.video_size, assigned.problem) == (size, problem)


def test_columns_of_sizes_are_read_only_if_there_are_several(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    lines = [
        "video,prompt,size,Height,width", "a,a,96x64,,", "a,a,,720.0,1280", "a,a,,,", "a,a,big,,", "a,a,,720,",
        "a,a,,0,10", "a,a,97x64,,",
    ]  # fmt: skip
    table.write_text("\n".join(lines))
    plain = list(read_csv_rows(table, text_only=False))
    assert all(row.video_size is row.shape is None and not row.problem for row in plain)
    rows = list(read_csv_rows(table, text_only=False, with_sizes=True))
    assert [row.video_size for row in rows] == [TALL, *[None] * 6] and rows[0].has_own_size
    assert [row.shape for row in rows] == [None, (720, 1280), *[None] * 5]
    assert [row.problem for row in rows] == [
        *("", "", ""),
        "size 'big': must be HEIGHTxWIDTH, such as 704x1280",
        "height '720' and width '' are not two numbers of pixels",
        "height '0' and width '10' are not two numbers of pixels",
        "size '97x64': height=97: must be a multiple of 32; nearest are 96 and 128",
    ]
    (shard,) = read_shard_rows(table, shard_size=9, text_only=False)
    assert rows_digest(shard) == rows_digest(plain)


def test_a_digest_covers_the_size_of_a_row() -> None:
    digests = {rows_digest([sized_row(0, size)]) for size in (None, *SIZES)}
    assert len(digests) == 4
    fields = '[0, 2, "a.mp4", "a", null, ""]'  # as data sets of one size have always had it
    assert rows_digest([ROW]) == hashlib.sha256(f"{fields}\n".encode()).hexdigest()


def test_shards_hold_one_size_and_added_rows_change_no_number() -> None:
    draw = random.Random(0)
    for _ in range(100):
        rows = [sized_row(number, draw.choice(SIZES)) for number in range(draw.randint(1, 60))]
        shard_size = draw.randint(1, 9)
        shards = dict(group_rows(rows, shard_size))
        assert sorted(shards) == list(range(len(shards)))
        assert sorted(row.number for shard in shards.values() for row in shard) == list(range(len(rows)))
        for size in SIZES:
            of_size = [shards[number] for number in sorted(shards) if shards[number][0].video_size == size]
            assert [row for shard in of_size for row in shard] == [row for row in rows if row.video_size == size]
            assert all(len(shard) == shard_size for shard in of_size[:-1])
        cut = dict(group_rows(rows[: draw.randint(1, len(rows))], shard_size))
        assert all(shards[number][: len(shard)] == shard for number, shard in cut.items())


def test_one_size_gives_the_shards_of_before() -> None:
    rows = [sized_row(number, None) for number in range(7)]
    assert list(group_rows(rows, 3)) == [(0, rows[:3]), (1, rows[3:6]), (2, rows[6:])]


@pytest.mark.parametrize(
    ("row", "size", "aspect", "problem"),
    [
        (sized_row(0, None), (10, 10), 1, ""),
        (sized_row(0, WIDE), (32, 48), 1, ""),  # enlarged exactly twice
        (sized_row(0, WIDE), (32, 47), 1, "is 32x47, too small for 64x96"),
        (sized_row(0, WIDE), (64, 47), 2, "is 64x47, too small for 64x96"),  # wide pixels are enlarged, too
        (sized_row(0, WIDE), (150, 100), 1, "belongs to size 96x64, and could not be read, or had another shape, when"),
        (replace(sized_row(0, WIDE), shape=(10, 15)), (150, 100), 1, "is displayed at 150x100, and the CSV says 10x15"),
        (replace(sized_row(0, WIDE), has_own_size=True), (150, 100), 1, ""),
    ],
)  # fmt: skip
def test_a_frame_that_does_not_fit_its_size_is_refused(
    row: Row, size: tuple[int, int], aspect: float, problem: str
) -> None:
    target = row.video_size or WIDE
    frame = FirstFrame(numpy.zeros((target.height, target.width, 3), numpy.uint8), size, aspect=aspect)
    found = size_problem(row, frame, SIZES, 2.0)
    assert found.startswith(problem) and bool(found) == bool(problem)
    if "too small" in problem:
        assert size_problem(row, frame, SIZES, 0.0) == ""


def test_the_crop_is_that_of_the_pixels() -> None:
    frame = FirstFrame(numpy.zeros((64, 96, 3), numpy.uint8), (100, 300))
    assert frame.crop == (0, 75, 100, 150)
    disc = FirstFrame(numpy.zeros((64, 64, 3), numpy.uint8), (576, 720), aspect=64 / 45)
    assert disc.shape == (576, 1024) and disc.crop == (0, 157.5, 576, 405)
    assert disc.enlargement == pytest.approx(64 / 405)
