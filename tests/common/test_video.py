"""Sizes of frames: their names, and the one nearest to a picture."""

import pytest

from common.video import FrameSize, VideoSpec, nearest_frame_size, parse_frame_size

LANDSCAPE, PORTRAIT, SQUARE = FrameSize(704, 1280), FrameSize(1280, 704), FrameSize(960, 960)


def test_a_size_is_written_as_height_x_width() -> None:
    assert parse_frame_size(" 704x1280 ") == LANDSCAPE == VideoSpec().frame_size
    assert str(PORTRAIT) == "1280x704"
    for text, problem in {
        "704": "HEIGHTxWIDTH", "704x": "HEIGHTxWIDTH", "-32x32": "HEIGHTxWIDTH", "704x1281": "width=1281", "0x32": "h",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            parse_frame_size(text)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1080, 1920, LANDSCAPE), (1920, 1080, PORTRAIT), (3, 2, PORTRAIT), (100, 110, SQUARE), (900, 2100, LANDSCAPE)],
)
def test_the_nearest_size_has_the_nearest_aspect_ratio(height: int, width: int, expected: FrameSize) -> None:
    assert nearest_frame_size([SQUARE, PORTRAIT, LANDSCAPE], height, width) == expected


def test_of_equal_ratios_the_nearest_area_is_taken_in_any_order() -> None:
    small = FrameSize(352, 640)
    for sizes in ([small, LANDSCAPE], [LANDSCAPE, small]):
        assert nearest_frame_size(sizes, 360, 640) == small
        assert nearest_frame_size(sizes, 1080, 1920) == LANDSCAPE
    assert nearest_frame_size([PORTRAIT, LANDSCAPE], 500, 500) == LANDSCAPE  # as far: the lower one
