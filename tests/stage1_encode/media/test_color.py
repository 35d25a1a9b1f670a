"""Colors of videos: matrices, ranges, HDR, wide gamuts, and videos without tags, in patches of known colors."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc

from stage1_encode.media.color import UNTAGGED_AS_601, UNTAGGED_AS_709, ColorRules, _to_array, convert_frame, is_changed
from stage1_encode.media.first_frame import FirstFrame, UnreadableError, read_first_frame
from stage1_encode.media.tone_mapping import bt709_to_light, light_to_bt709, light_to_pq, srgb_to_light
from tests.stage1_encode.media.test_tone_mapping import PATCHES, encode_hlg, to_gamut

WEIGHTS = {  # FFmpeg's number of a matrix: the weights of red and blue in luma
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),  # unspecified: FFmpeg takes BT.601
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
CODECS = {
    "10": ("libx264", {"qp": "0"}),
    "12": ("ffv1", {}),
    ".avif": ("libsvtav1", {"crf": "1", "preset": "8"}),
}
BT2020, BT601, BT709, UNTAGGED = 9, 6, 1, 2


@dataclass(frozen=True)
class Tags:
    """The color tags of a video, in FFmpeg's numbers."""

    matrix: int = BT709
    curve: int = UNTAGGED
    primaries: int = UNTAGGED
    full: bool = False


def planes(rgb: numpy.ndarray, weights: tuple[float, float], *, full: bool, bits: int) -> list[numpy.ndarray]:
    """Y, Cb and Cr (H W) of a signal (H W 3) in [0, 1], 4:2:0 (ITU-T H.273)."""
    red, blue = weights
    luma = rgb @ numpy.array([red, 1 - red - blue, blue])
    chroma = (rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)
    unit, top = 1 << (bits - 8), (1 << bits) - 1
    scaled = [luma * top] if full else [(16 + 219 * luma) * unit]
    scaled += [128 * unit + part * (top if full else 224 * unit) for part in chroma]
    return [plane[::step, ::step].round() for plane, step in zip(scaled, (1, 2, 2), strict=True)]


def patch_video(
    path: Path, signal: numpy.ndarray, tags: Tags, *, bits: int = 8, height: int = 64, matrix: int = 0
) -> str:
    """A lossless video of patches side by side, whose signals (N 3) are coded with `matrix` (0: that of the tags)."""
    form, dtype = ("yuv420p", numpy.uint8) if bits == 8 else (f"yuv420p{bits}le", numpy.uint16)
    rgb = numpy.tile(numpy.repeat(signal, 32, 0), (height, 1, 1))
    frame = av.VideoFrame(rgb.shape[1], height, form)
    coded = planes(rgb, WEIGHTS[matrix or tags.matrix], full=tags.full, bits=bits)
    for plane, values in zip(frame.planes, coded, strict=True):
        padded = numpy.zeros((len(values), plane.line_size // dtype().itemsize), dtype)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    with av.open(str(path), "w") as file:
        codec, options = CODECS.get(path.suffix, CODECS["12" if bits > 10 else "10"])
        stream = file.add_stream(codec, rate=24, options=options | {"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, form
        context = stream.codec_context
        context.colorspace, context.color_range = tags.matrix, 2 if tags.full else 1
        context.color_trc, context.color_primaries = tags.curve, tags.primaries
        frame.colorspace, frame.color_range = tags.matrix, 2 if tags.full else 1
        frame.color_trc, frame.color_primaries = tags.curve, tags.primaries
        for _ in range(1 if path.suffix == ".avif" else 2):
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def patches_of(frame: FirstFrame) -> numpy.ndarray:
    """The colors (N 3) of patches side by side."""
    return frame.pixels[32, 16::32].astype(int)


def read(path: str, rules: ColorRules | None = None) -> FirstFrame:
    return read_first_frame(path, height=64, width=32 * len(PATCHES), rules=rules or ColorRules())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_matrix_and_a_range_are_undone(name: str, matrix: int, full: bool, tmp_path: Path) -> None:
    frame = read(patch_video(tmp_path / name, PATCHES / 255, Tags(matrix, full=full)))
    assert abs(patches_of(frame) - PATCHES).max() <= 3  # 8 bits of luma and chroma
    assert frame.color == ""


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("curve", [ColorTrc.ARIB_STD_B67, ColorTrc.SMPTE2084])
def test_hdr_is_tone_mapped(curve: ColorTrc, full: bool, bits: int, tmp_path: Path) -> None:
    light = to_gamut(srgb_to_light(PATCHES / 255), "BT.2020")
    is_hlg = curve == ColorTrc.ARIB_STD_B67
    signal = encode_hlg(light) if is_hlg else light_to_pq(light)
    tags = Tags(BT2020, curve, ColorPrimaries.BT2020, full)
    frame = read(path := patch_video(tmp_path / "hdr.mkv", signal, tags, bits=bits))
    assert abs(patches_of(frame) - PATCHES).max() <= (12 if bits == 8 else 2)
    assert frame.color == ("HLG to SDR" if is_hlg else "PQ to SDR") and is_changed(frame.color)
    with pytest.raises(UnreadableError, match=r"is HDR .*--hdr tonemap"):
        read(path, ColorRules(hdr="refuse"))


def test_hdr_with_a_curve_alone_is_taken_for_bt2020(tmp_path: Path) -> None:
    signal = light_to_pq(to_gamut(srgb_to_light(PATCHES / 255), "BT.2020"))
    tags = Tags(UNTAGGED, ColorTrc.SMPTE2084)
    frame = read(patch_video(tmp_path / "hdr.mkv", signal, tags, bits=10, matrix=BT2020))
    assert abs(patches_of(frame) - PATCHES).max() <= 2


@pytest.mark.parametrize(
    ("primaries", "matrix", "gamut"),
    [(ColorPrimaries.BT2020, BT2020, "BT.2020"), (ColorPrimaries.SMPTE432, BT709, "P3")],
)
@pytest.mark.parametrize("bits", [8, 10])
def test_a_wide_gamut_becomes_bt709(primaries: int, matrix: int, gamut: str, bits: int, tmp_path: Path) -> None:
    signal = light_to_bt709(to_gamut(bt709_to_light(PATCHES / 255), gamut))
    frame = read(patch_video(tmp_path / "wide.mp4", signal, Tags(matrix, ColorTrc.BT709, primaries), bits=bits))
    assert abs(patches_of(frame) - PATCHES).max() <= 4
    assert frame.color == f"{gamut} to sRGB"


@pytest.mark.parametrize("rule", ["bt601", "bt709"])
@pytest.mark.parametrize(("height", "is_hd"), [(576, False), (720, True)])
def test_untagged_hd_is_read_by_the_rule_and_told(rule: str, height: int, is_hd: bool, tmp_path: Path) -> None:
    as_709 = is_hd and rule == "bt709"
    path = patch_video(
        tmp_path / "a.mp4", PATCHES / 255, Tags(UNTAGGED), height=height, matrix=BT709 if as_709 else BT601
    )
    frame = read_first_frame(path, height=height, width=32 * len(PATCHES), rules=ColorRules(untagged_hd=rule))
    assert abs(patches_of(frame) - PATCHES).max() <= 3
    assert frame.color == ("" if not is_hd else UNTAGGED_AS_709 if as_709 else UNTAGGED_AS_601)
    assert is_changed(frame.color) == as_709


@pytest.mark.parametrize(("matrix", "name"), [(8, "YCgCo"), (10, "constant luminance"), (14, "ICtCp")])
def test_a_matrix_that_is_not_read_is_named(matrix: int, name: str, tmp_path: Path) -> None:
    path = patch_video(tmp_path / "a.mp4", PATCHES / 255, Tags(matrix), matrix=BT2020, bits=10)
    with pytest.raises(UnreadableError, match=name):
        read(path)


def test_a_video_in_rgb_needs_no_matrix(tmp_path: Path) -> None:
    pixels = numpy.tile(numpy.repeat(PATCHES, 32, 0), (720, 1, 1)).astype(numpy.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = pixels.shape[1], 720, "bgr0"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        file.mux(stream.encode())
    frame = read_first_frame(str(tmp_path / "a.mkv"), height=720, width=pixels.shape[1])
    assert (frame.pixels == pixels).all() and frame.color == ""


def test_a_png_of_hdr_is_tone_mapped(tmp_path: Path) -> None:
    """16 bits and the chunk cICP (PNG, third edition), written by hand."""
    signal = light_to_pq(to_gamut(srgb_to_light(PATCHES / 255), "BT.2020"))
    rows = numpy.tile(numpy.repeat((signal * 65535).round().astype(">u2"), 32, 0), (64, 1, 1))
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], len(rows), 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"cICP": bytes([9, 16, 0, 1]), b"IDAT": zlib.compress(lines), b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    frame = read(str(tmp_path / "a.png"))
    assert abs(patches_of(frame) - PATCHES).max() <= 1
    assert frame.color == "PQ to SDR"


def test_an_avif_of_hdr_is_tone_mapped(tmp_path: Path) -> None:
    signal = encode_hlg(to_gamut(srgb_to_light(PATCHES / 255), "BT.2020"))
    tags = Tags(BT2020, ColorTrc.ARIB_STD_B67, ColorPrimaries.BT2020, full=True)
    frame = read(patch_video(tmp_path / "a.avif", signal, tags, bits=10))
    assert abs(patches_of(frame) - PATCHES).max() <= 4  # the encoder has no lossless mode
    assert frame.color == "HLG to SDR"


def test_light_of_a_file_may_be_linear(tmp_path: Path) -> None:
    codes = (numpy.tile(numpy.repeat(srgb_to_light(PATCHES / 255), 32, 0), (64, 1, 1)) * 65535).round()
    frame = av.VideoFrame.from_ndarray(codes.astype(numpy.uint16), format="rgb48le")
    frame.color_trc = ColorTrc.LINEAR
    image, color = convert_frame(frame, ColorRules())
    assert abs(numpy.asarray(image)[32, 16::32].astype(int) - PATCHES).max() <= 1 and color == "linear to sRGB"


def test_transparency_of_hdr_is_kept() -> None:
    codes = numpy.zeros((4, 4, 4), numpy.uint16)
    codes[..., :3], codes[..., 3] = round(0.5807 * 65535), 0x8080
    frame = av.VideoFrame.from_ndarray(codes, format="rgba64le")
    frame.color_trc, frame.color_primaries = ColorTrc.SMPTE2084, ColorPrimaries.BT2020
    image, _ = convert_frame(frame, ColorRules())
    assert abs(numpy.asarray(image).astype(int) - (255, 255, 255, 128)).max() <= 1


@pytest.mark.parametrize("curve", [ColorTrc.BT709, ColorTrc.SMPTE2084])
@pytest.mark.parametrize(("form", "bits"), [("gray", 8), ("gray10le", 10)])
def test_the_limited_range_of_grey_is_undone(form: str, bits: int, curve: int, tmp_path: Path) -> None:
    """FFmpeg's converter takes every grey for full range; AV1 and HEVC have it in both."""
    levels = numpy.array([255, 128, 60, 0])
    signal = light_to_pq(srgb_to_light(levels / 255)) if curve == ColorTrc.SMPTE2084 else levels / 255
    row = numpy.repeat((16 + 219 * signal) * 2 ** (bits - 8), 32).round()
    codes = numpy.tile(row, (64, 1)).astype(numpy.uint8 if bits == 8 else numpy.uint16)
    frame = av.VideoFrame.from_ndarray(codes, format=form)
    frame.color_range, frame.color_trc, frame.color_primaries = 1, curve, ColorPrimaries.BT709
    image, _ = convert_frame(frame, ColorRules())
    tolerance = 8 if bits == 8 and curve == ColorTrc.SMPTE2084 else 2
    assert abs(numpy.asarray(image)[32, 16::32].astype(int) - levels[:, None]).max() <= tolerance


def test_dolby_vision_without_another_layer_is_refused(tmp_path: Path) -> None:
    path = Path(patch_video(tmp_path / "a.mp4", PATCHES / 255, Tags(UNTAGGED), bits=10))
    assert path.read_bytes().count(b"avc1")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"dva1"))
    with pytest.raises(UnreadableError, match="Dolby Vision"):
        read(str(path))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads by Linux's /proc")
@pytest.mark.parametrize("curve", [UNTAGGED, ColorTrc.ARIB_STD_B67])
def test_a_conversion_starts_no_threads(curve: int) -> None:
    frame = av.VideoFrame(1280, 704, "yuv420p10le")
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.color_trc = curve
    before = set(Path("/proc/self/task").iterdir())
    convert_frame(frame, ColorRules())
    assert set(Path("/proc/self/task").iterdir()) <= before  # the frame keeps its converter, with its threads


def test_pixels_without_a_conversion_are_named() -> None:
    with pytest.raises(UnreadableError, match=r"has pixels that cannot be converted \(.+\); encode it again"):
        _to_array(av.VideoFrame(16, 16, "yuv420p"), "bayer_rggb8", None)  # only read, never written
