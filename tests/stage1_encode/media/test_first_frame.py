"""First frames: upright, with their aspect, cropped around the centre; PyAV and decord agree."""

from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from stage1_encode.media import first_frame as frames
from stage1_encode.media.first_frame import read_first_frame, resize_and_crop
from stage1_encode.media.video_frame import NoDecoderError, UnreadableError
from tests import tiny_models

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


def stripes(height: int, width: int) -> numpy.ndarray:
    """Left third red, middle green, right blue."""
    image = numpy.empty((height, width, 3), numpy.uint8)
    for index, colour in enumerate((RED, GREEN, BLUE)):
        image[:, index * width // 3 : (index + 1) * width // 3] = colour
    return image


def close(pixel: numpy.ndarray, colour: tuple[int, int, int], within: int = 12) -> bool:
    return bool((abs(pixel.astype(int) - numpy.array(colour)) <= within).all())


def video(path: Path, image: numpy.ndarray, *, rotation: int = 0, aspect: int = 1, turn: tuple[int, ...] = ()) -> str:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "4", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
        if aspect > 1:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect, 1)
        if rotation:
            stream.set_display_rotation(rotation)
        if turn:
            xx, xy, yx, yy = (part << 16 for part in turn)
            stream.set_display_matrix((xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30))
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return str(path)


def test_a_wide_frame_is_cropped_left_and_right() -> None:
    wide = resize_and_crop(Image.fromarray(stripes(64, 288)), height=64, width=96)
    assert wide.shape == (64, 96, 3)
    assert close(wide[:, 4:92].reshape(-1, 3).mean(0), GREEN, 1)


def test_a_tall_frame_is_cropped_above_and_below() -> None:
    tall = resize_and_crop(Image.fromarray(stripes(288, 96).transpose(1, 0, 2)[:288]), height=32, width=32)
    assert tall.shape == (32, 32, 3)
    turned = resize_and_crop(Image.fromarray(numpy.rot90(stripes(96, 288)).copy()), height=96, width=96)
    assert close(turned[48, 48], GREEN, 1)


def test_resizing_is_antialiased() -> None:
    board = (numpy.indices((256, 256)).sum(0) % 2 * 255).astype(numpy.uint8)
    small = resize_and_crop(Image.fromarray(board).convert("RGB"), height=32, width=32)
    assert abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 2  # nearest neighbours would give 0 or 255


def test_the_aspect_is_kept() -> None:
    y, x = numpy.mgrid[:200, :400]
    disc = (((y - 100) ** 2 + (x - 200) ** 2 < 60**2) * 255).astype(numpy.uint8)
    small = resize_and_crop(Image.fromarray(disc).convert("RGB"), height=96, width=64)[..., 0] > 127
    assert abs(int(small.any(0).sum()) - int(small.any(1).sum())) <= 1


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_video_is_turned_upright(suffix: str, rotation: int, tmp_path: Path) -> None:
    path = video(tmp_path / f"turned{suffix}", stripes(64, 96), rotation=rotation)
    expected = numpy.rot90(stripes(64, 96), rotation // 90)  # the display matrix counts against the clock
    frame = read_first_frame(path, height=expected.shape[0], width=expected.shape[1])
    assert frame.size == expected.shape[:2]
    for y, x in ((8, 8), (8, -8), (-8, 8), (-8, -8)):
        assert close(frame.pixels[y, x], tuple(expected[y, x]))


def test_decord_is_asked_only_where_pyav_has_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "a.mp4", stripes(64, 96))
    by_av = read_first_frame(path, height=64, width=96).pixels
    asked = []

    def refuse(path: str) -> None:
        asked.append(path)
        raise NoDecoderError("is in the codec h264, for which there is no decoder")

    monkeypatch.setattr(frames, "open_video", refuse)
    assert numpy.array_equal(read_first_frame(path, height=64, width=96).pixels, by_av) and asked == [path]
    monkeypatch.setattr(frames, "decord", None)
    with pytest.raises(UnreadableError, match="codec h264"):
        read_first_frame(path, height=64, width=96)


@pytest.mark.parametrize("turn", [(x, 0, 0, y) for x in (1, -1) for y in (1, -1)])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_mirrored_video_is_mirrored_back(suffix: str, turn: tuple[int, ...], swapped: bool, tmp_path: Path) -> None:
    upright = tiny_models.picture(64, 96, seed=0)
    stored = upright[:: turn[3], :: turn[0]]
    if swapped:
        stored, turn = stored.transpose(1, 0, 2), (0, turn[3], turn[0], 0)
    path = video(tmp_path / f"mirrored{suffix}", numpy.ascontiguousarray(stored), turn=turn)
    frame = read_first_frame(path, height=64, width=96)
    assert frame.size == (64, 96)
    assert abs(frame.pixels.astype(int) - upright).mean() < 4


def test_of_several_videos_the_main_one_is_read(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mp4"), "w") as file:
        streams = [file.add_stream("libx264", rate=24, options={"threads": "1"}) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for stream, colour in zip(streams, (RED, BLUE), strict=True):
            image = numpy.full((64, 96, 3), colour, numpy.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode())
    assert close(read_first_frame(str(tmp_path / "two.mp4"), height=64, width=64).pixels[32, 32], BLUE)


@pytest.mark.parametrize(("rotation", "size"), [(0, (64, 96)), (90, (96, 64))])
def test_wide_pixels_are_shown_wide(rotation: int, size: tuple[int, int], tmp_path: Path) -> None:
    path = video(tmp_path / "anamorphic.mp4", stripes(64, 96), aspect=2, rotation=rotation)
    frame = read_first_frame(path, height=64, width=64)
    assert frame.size == size
    assert close(frame.pixels[4:-4, 4:-4].reshape(-1, 3).mean(0), GREEN, 6)  # 192 wide as shown: 64 of it is green


TURNS = {  # EXIF orientation -> how an upright picture is stored
    1: lambda a: a,
    2: numpy.fliplr,
    3: lambda a: numpy.rot90(a, 2),
    4: numpy.flipud,
    5: lambda a: numpy.rot90(numpy.fliplr(a), 1),
    6: lambda a: numpy.rot90(a, 1),
    7: lambda a: numpy.rot90(numpy.fliplr(a), -1),
    8: lambda a: numpy.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("jpg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("png", mode) for mode in ("RGB", "RGBA", "L", "LA", "I;16")),
        *((suffix, mode) for suffix in ("webp", "avif") for mode in ("RGB", "RGBA")),
        *(("tif", mode) for mode in ("RGB", "RGBA", "L", "CMYK", "YCbCr", "I;16")),
    ],
)
def test_a_picture_is_turned_by_its_orientation(suffix: str, mode: str, orientation: int, tmp_path: Path) -> None:
    upright = tiny_models.picture(64, 96, seed=0)
    if mode in ("L", "LA", "I;16"):
        upright = numpy.asarray(Image.fromarray(upright).convert("L").convert("RGB"))
    stored = Image.fromarray(numpy.ascontiguousarray(TURNS[orientation](upright)))
    if mode == "I;16":
        stored = Image.fromarray(numpy.asarray(stored.convert("L")).astype(numpy.uint16) * 257)
    else:
        stored = stored.convert(mode)
    exif, path = Image.Exif(), tmp_path / f"photo.{suffix}"
    exif[0x0112] = orientation
    if suffix == "tif":
        stored.save(path, tiffinfo={0x0112: orientation})
    else:
        stored.save(path, quality=95, exif=exif)
    frame = read_first_frame(str(path), height=64, width=96)
    assert frame.size == (64, 96)
    assert abs(frame.pixels.astype(int) - upright).mean() < 3


@pytest.mark.parametrize(
    ("color", "noise", "emptiness"),
    [
        ((0, 0, 0), 0, "black first frame"),
        ((10, 8, 12), 6, "black first frame"),
        ((128, 128, 128), 0, "first frame of a single color"),
        ((0, 135, 0), 2, "first frame of a single color"),
        ((255, 255, 255), 0, "first frame of a single color"),
        ((40, 40, 40), 20, ""),
    ],
)
def test_an_empty_frame_is_told(color: tuple[int, int, int], noise: int, emptiness: str, tmp_path: Path) -> None:
    grain = numpy.random.default_rng(0).integers(-noise, noise + 1, (256, 384, 3))
    Image.fromarray((grain + color).clip(0, 255).astype(numpy.uint8)).save(tmp_path / "empty.png")
    assert read_first_frame(str(tmp_path / "empty.png"), height=256, width=384).emptiness == emptiness


def test_a_dark_picture_is_not_empty(tmp_path: Path) -> None:
    Image.fromarray(tiny_models.picture(64, 96, seed=0) // 6).save(tmp_path / "dark.png")
    assert read_first_frame(str(tmp_path / "dark.png"), height=64, width=96).emptiness == ""


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "picture.png")
    pixels = read_first_frame(str(tmp_path / "picture.png"), height=64, width=64).pixels
    assert close(pixels[32, 8], (0, 0, 255), 1) and close(pixels[32, 56], (255, 255, 255), 1)


def test_a_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(numpy.full((64, 64), 128 * 257, numpy.uint16)).save(tmp_path / "grey.png")
    pixels = read_first_frame(str(tmp_path / "grey.png"), height=32, width=32).pixels
    assert (pixels == 128).all()


def test_a_program_is_never_started_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(UnreadableError, match="no readable video"):
        read_first_frame(str(tmp_path / "picture.png"), height=32, width=32)
