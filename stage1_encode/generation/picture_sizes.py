"""Which of a student's sizes each row of a CSV gets: the one whose aspect ratio is nearest to the row's picture."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.video import FrameSize, nearest_frame_size
from stage1_encode.media.first_frame import read_displayed_shape
from stage1_encode.media.rows import Row, locate_file, read_csv_rows
from stage1_encode.media.video_frame import UnreadableError

HEADER_THREADS = 8


def group_rows_by_size(
    table: Path, sizes: Sequence[FrameSize], base_folder: str | None
) -> dict[FrameSize, frozenset[int]]:
    """Numbers of the rows of each size, in the order of `sizes`; those without a picture have the first size."""
    rows = list(read_csv_rows(table, text_only=True))
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        shapes = list(pool.map(partial(read_row_shape, table=table, base_folder=base_folder), rows))
    chosen = [nearest_frame_size(sizes, *shape) if shape else sizes[0] for shape in shapes]
    if len(rows) == 1 and shapes[0]:
        height, width = shapes[0]
        others = ", ".join(str(size) for size in sizes if size != chosen[0])
        logging.info(
            "sample: %s (height x width), nearest to the picture's %dx%d; the student also knows %s",
            chosen[0], height, width, others,
        )  # fmt: skip
    elif len(rows) > 1:
        counts = ", ".join(f"{chosen.count(size)} of {size}" for size in sizes if size in chosen)
        logging.info("sample: each video has the size nearest to its picture: %s (height x width)", counts)
    numbers = {size: [row.number for row, own in zip(rows, chosen, strict=True) if own == size] for size in sizes}
    return {size: frozenset(own) for size, own in numbers.items() if own}


def read_row_shape(row: Row, table: Path, base_folder: str | None) -> tuple[int, int] | None:
    """(height, width) at which a row's picture is displayed; None without one, or if it cannot be read."""
    if not row.path:
        return None
    try:
        return read_displayed_shape(locate_file(table, row.path, base_folder))
    except UnreadableError:  # which is said when the pictures are encoded
        return None
