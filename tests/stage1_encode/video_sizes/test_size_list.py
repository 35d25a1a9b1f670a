"""The option `sizes`."""

import pytest
import torch._dynamo

from stage1_encode.config import MAX_COMPILED_SIZES, EncodeConfig
from stage1_encode.video_sizes.size_list import format_frame_sizes, list_frame_sizes


@pytest.mark.parametrize(
    ("text", "area", "sizes"),
    [
        ("", 704 * 1280, ""),
        ("1280x704, 704x1280,960x960", 1, "704x1280,960x960,1280x704"),
        ("auto", 704 * 1280, "608x1440,704x1280,832x1088,960x960,1088x832,1280x704,1440x608"),
        (" AUTO ", 480 * 832, "416x960,480x832,544x736,640x640,736x544,832x480,960x416"),
        ("auto", 32 * 32, "32x32"),
    ],
)
def test_sizes_are_listed_in_their_order(text: str, area: int, sizes: str) -> None:
    assert format_frame_sizes(list_frame_sizes(text, area)) == sizes


@pytest.mark.parametrize("area", [704 * 1280, 480 * 832, 256 * 256])
def test_automatic_sizes_keep_the_area(area: int) -> None:
    for size in list_frame_sizes("auto", area):
        assert 0.85 < size.height * size.width / area < 1.15


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("704", "sizes=704: must be HEIGHTxWIDTH"),
        ("704x1280,", "must be HEIGHTxWIDTH"),
        ("700x1280", "sizes=700x1280: height=700: must be a multiple of 32; nearest are 672 and 704"),
        ("704x1280,0704x1280", "names a size twice"),
        ("automatic", "must be HEIGHTxWIDTH"),
    ],
)
def test_wrong_sizes_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EncodeConfig("a.csv", "model", "out", sizes=text)


def test_no_more_sizes_are_compiled_than_pytorch_keeps() -> None:
    text = ",".join(f"{32 * side}x64" for side in range(1, 10))
    assert len(EncodeConfig("a.csv", "model", "out", sizes=text).frame_sizes) == MAX_COMPILED_SIZES + 1
    with pytest.raises(ValueError, match="at most 8 sizes with --compile; leave it out"):
        EncodeConfig("a.csv", "model", "out", sizes=text, compile=True)
    assert torch._dynamo.config.recompile_limit >= MAX_COMPILED_SIZES


def test_a_limit_of_enlargement_needs_sizes() -> None:
    with pytest.raises(ValueError, match=r"max_upscale=1.5: applies to several sizes; give --sizes too"):
        EncodeConfig("a.csv", "model", "out", max_upscale=1.5)
    assert EncodeConfig("a.csv", "model", "out", max_upscale=1.5, sizes="704x1280").max_upscale == 1.5
