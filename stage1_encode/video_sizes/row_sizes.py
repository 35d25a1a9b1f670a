"""Rows -> shards: each row gets a size, a shard holds rows of one size: a pure function of the CSV and the survey."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from common.video import FrameSize, nearest_frame_size
from stage1_encode.config import EncodeConfig
from stage1_encode.media.first_frame import FirstFrame
from stage1_encode.media.rows import Row
from stage1_encode.video_sizes.header_survey import HeaderSurvey
from stage1_encode.video_sizes.size_list import format_frame_sizes


def assign_sizes(config: EncodeConfig, rows: Iterable[Row], *, is_begun: bool) -> Iterator[Row]:
    """Yield rows with the size at which each is encoded, or as they are if the data set has one size.

    is_begun: see `HeaderSurvey`, as for errors.
    """
    sizes = config.frame_sizes
    if not sizes:
        yield from rows
        return
    for row, shape in HeaderSurvey(config, is_begun=is_begun).add_shapes(rows):
        yield assign_size(row, sizes, shape)


def assign_size(row: Row, sizes: Sequence[FrameSize], shape: tuple[int, int] | None) -> Row:
    """A row with its size: its own, else that nearest to the CSV's shape, else to that of its file.

    Rows without any of these, such as texts alone and files that cannot be read, get the first size.
    """
    if row.has_own_size:
        if row.video_size in sizes:
            return row
        problem = f"size {row.video_size} is none of {format_frame_sizes(sizes)}"
        return replace(row, video_size=sizes[0], problem=problem)
    shape = row.shape or shape
    return replace(row, video_size=nearest_frame_size(sizes, *shape) if shape else sizes[0])


def group_rows(rows: Iterable[Row], shard_size: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield (number, rows) of each shard as it is full, then those that are not, by number.

    A shard has its number from its first row on, so rows that are added to a CSV change no number.
    """
    open_shards: dict[FrameSize | None, tuple[int, list[Row]]] = {}
    count = 0
    for row in rows:
        if row.video_size not in open_shards:
            open_shards[row.video_size] = count, []
            count += 1
        shard = open_shards[row.video_size]
        shard[1].append(row)
        if len(shard[1]) == shard_size:
            yield open_shards.pop(row.video_size)
    yield from sorted(open_shards.values(), key=lambda shard: shard[0])


def size_problem(row: Row, frame: FirstFrame, sizes: Sequence[FrameSize], max_upscale: float) -> str:
    """Why a row's first frame must not be encoded at the row's size; "" = it may, or the data set has one size."""
    if row.video_size is None:
        return ""
    height, width = frame.shape
    nearest = nearest_frame_size(sizes, height, width)
    if nearest != row.video_size and not row.has_own_size:
        if row.shape:
            return f"is displayed at {height}x{width}, and the CSV says {row.shape[0]}x{row.shape[1]} (height x width)"
        return (
            f"belongs to size {nearest}, and could not be read, or had another shape, when sizes were given; add it to "
            "the CSV's end again"
        )
    if max_upscale and frame.enlargement > max_upscale:
        return f"is {frame.size[0]}x{frame.size[1]}, too small for {row.video_size} (height x width)"
    return ""
