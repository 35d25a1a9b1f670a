"""The sizes of a data set, from the option `sizes` of `encode`."""

import math
from collections.abc import Sequence
from itertools import product

from common.video import PATCH_SIZE, SPACE_STRIDE, FrameSize, parse_frame_size

AUTO = "auto"
# Width : height of films, television, old television, squares, and the same upright. TI2V-5B takes any shape of its
# area whose sides are multiples of 32: `best_output_size` in wan/utils/utils.py of github.com/Wan-Video/Wan2.2.
AUTO_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16), (9, 21))
SIDE_STEP = SPACE_STRIDE * PATCH_SIZE


def list_frame_sizes(text: str, area: int) -> tuple[FrameSize, ...]:
    """The sizes that the text `704x1280,1280x704` names, sorted, or those of `auto` with this area in pixels.

    An empty text gives none. ValueError for a wrong size or one that is named twice.
    """
    if not text.strip():
        return ()
    if text.strip().lower() == AUTO:
        return tuple(sorted({_size_of_ratio(area, width / height) for width, height in AUTO_RATIOS}))
    try:
        sizes = [parse_frame_size(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"sizes={text}: {error}") from error
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes={text}: names a size twice; name each once")
    return tuple(sorted(sizes))  # so that the order of the option makes no difference


def format_frame_sizes(sizes: Sequence[FrameSize]) -> str:
    """The option `sizes` that names these sizes."""
    return ",".join(map(str, sizes))


def _size_of_ratio(area: int, ratio: float) -> FrameSize:
    """The size nearest to an area and a ratio of width to height: the sum of both logarithmic deviations is least."""
    sides = (math.sqrt(area / ratio) / SIDE_STEP, math.sqrt(area * ratio) / SIDE_STEP)
    steps = [(max(1, math.floor(side)), max(1, math.ceil(side))) for side in sides]
    sizes = [FrameSize(height * SIDE_STEP, width * SIDE_STEP) for height, width in product(*steps)]

    def deviation(size: FrameSize) -> tuple[float, FrameSize]:
        shape, extent = size.width / size.height / ratio, size.height * size.width / area
        return round(abs(math.log(shape)) + abs(math.log(extent)), 9), size

    return min(sizes, key=deviation)
