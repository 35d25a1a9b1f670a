"""Color profiles of pictures: profiles made by hand, in every mode that may carry one."""

import struct
from itertools import product
from pathlib import Path
from zlib import crc32

import numpy
import pytest
from PIL import Image, ImageCms

from stage1_encode.media.first_frame import FirstFrame, read_first_frame
from stage1_encode.media.icc_profile import CONVERTED, UNUSABLE
from stage1_encode.media.tone_mapping import CHROMATICITIES, D65, light_to_srgb, rgb_to_xyz, srgb_to_light
from tests.stage1_encode.media.test_tone_mapping import PATCHES, to_gamut

D50 = numpy.array([0.9642, 1.0, 0.8249])
BRADFORD = numpy.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
WHITE_D65 = numpy.array([D65[0] / D65[1], 1, (1 - D65[0] - D65[1]) / D65[1]])
TO_D50 = numpy.linalg.inv(BRADFORD) @ numpy.diag((BRADFORD @ D50) / (BRADFORD @ WHITE_D65)) @ BRADFORD
CYAN_LAB = (55, -35, -45)
# Adobe RGB stands beside the gamuts of videos in these tests
CHROMATICITIES_OF = {"Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), "P3": CHROMATICITIES["P3"]}


def fixed(values: object) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def make_profile(space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2.4 with these tags."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz_tag(D50)} | tags
    body, index, start = b"", b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        index += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + index + body


def xyz_tag(values: object) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(values)


def gamma_tag(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(name: str, gamma: float = 2.2) -> bytes:
    columns = numpy.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES_OF[name]]).T
    matrix = TO_D50 @ (columns * numpy.linalg.solve(columns, WHITE_D65))
    tags = {tag: xyz_tag(matrix[:, index]) for index, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return make_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_tag(gamma)))


def cmyk_profile() -> bytes:
    """Ink whose cyan is `CYAN_LAB`, whose paper is white and whose black is black; other mixtures are grey."""
    grid = bytearray()
    for cyan, magenta, yellow, black in product((0, 1), repeat=4):
        lab = (0, 0, 0) if black else CYAN_LAB if (cyan, magenta, yellow) == (1, 0, 0) else (100, 0, 0)
        lab = lab if not (magenta or yellow) or black else (60, 0, 0)
        grid += bytes([round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128])
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    table += bytes(range(256)) * 4 + bytes(grid) + bytes(range(256)) * 3
    return make_profile(b"CMYK", {b"A2B0": table, b"A2B1": table}, kind=b"prtr", pcs=b"Lab ")


def lab_to_srgb(lab: tuple[int, int, int]) -> numpy.ndarray:
    """CIE Lab under D50 as sRGB in [0, 255]."""
    y = (lab[0] + 16) / 116
    ratios = numpy.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = D50 * numpy.where(ratios > 6 / 29, ratios**3, 3 * (6 / 29) ** 2 * (ratios - 4 / 29))
    light = numpy.linalg.inv(rgb_to_xyz("BT.709")) @ numpy.linalg.inv(TO_D50) @ xyz
    return 255 * light_to_srgb(light.clip(0, 1))


def in_profile(name: str, rgb: numpy.ndarray) -> numpy.ndarray:
    """sRGB colors (N 3) of 255 as code values of `rgb_profile`."""
    columns = numpy.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES_OF[name]]).T
    to_xyz = columns * numpy.linalg.solve(columns, WHITE_D65)
    light = srgb_to_light(rgb / 255) @ (numpy.linalg.inv(to_xyz) @ rgb_to_xyz("BT.709")).T
    return (255 * light.clip(0, 1) ** (1 / 2.2)).round().astype(numpy.uint8)


def read(path: Path) -> FirstFrame:
    return read_first_frame(str(path), height=64, width=32 * len(PATCHES))


def as_picture(colors: numpy.ndarray) -> Image.Image:
    return Image.fromarray(numpy.tile(numpy.repeat(colors, 32, 0), (64, 1, 1)).astype(numpy.uint8))


def patches_of(frame: FirstFrame) -> numpy.ndarray:
    return frame.pixels[32, 16::32].astype(int)


SAVE_OPTIONS = {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
SAVE_OPTIONS |= {"avif": {"quality": 100, "subsampling": "4:4:4"}}


@pytest.mark.parametrize("suffix", SAVE_OPTIONS)
@pytest.mark.parametrize("name", CHROMATICITIES_OF)
def test_a_wide_profile_becomes_srgb(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    as_picture(in_profile(name, PATCHES)).save(path, icc_profile=rgb_profile(name), **SAVE_OPTIONS[suffix])
    frame = read(path)
    assert abs(patches_of(frame) - PATCHES).max() <= 4
    assert frame.color == CONVERTED


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_profile_of_srgb_changes_no_bit(suffix: str, tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (64, 128, 3), numpy.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("with", srgb), ("without", None)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}", icc_profile=profile)
    frame, expected = (read(tmp_path / f"{name}.{suffix}") for name in ("with", "without"))
    assert (frame.pixels == expected.pixels).all() and frame.color == ""


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_a_grey_profile_is_applied(mode: str, tmp_path: Path) -> None:
    grey = numpy.full((64, 128), 0 if mode == "1" else 100, numpy.uint8)
    image = Image.fromarray(grey.astype(numpy.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=make_profile(b"GRAY", {b"kTRC": gamma_tag(1.8)}))
    frame = read(tmp_path / "a.png")
    expected = 0 if mode == "1" else 255 * light_to_srgb(numpy.array([(100 / 255) ** 1.8]))[0]
    assert abs(frame.pixels.astype(int) - expected).max() <= 1
    assert frame.color == CONVERTED


def test_ink_is_shown_by_its_profile(tmp_path: Path) -> None:
    inks = numpy.array([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 0, 0)], numpy.uint8)
    image = Image.fromarray(numpy.tile(numpy.repeat(inks, 32, 0), (64, 1, 1)), "CMYK")
    image.save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    frame = read(tmp_path / "a.tif")
    expected = [lab_to_srgb(lab) for lab in ((100, 0, 0), CYAN_LAB, (0, 0, 0), (60, 0, 0))]
    assert abs(patches_of(frame) - numpy.array(expected)).max() <= 3
    assert frame.color == CONVERTED


def test_a_palette_and_its_transparency_are_kept(tmp_path: Path) -> None:
    image = as_picture(in_profile("Adobe RGB", PATCHES)).quantize(8)
    index = image.getpixel((16, 32))
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("Adobe RGB"), transparency=index)
    pixels = patches_of(read(tmp_path / "a.png"))
    assert (pixels[0] == 255).all()  # transparent pixels show white
    assert abs(pixels[1:] - PATCHES[1:]).max() <= 4


def test_half_transparent_colors_are_converted_before_they_lie_on_white(tmp_path: Path) -> None:
    image = as_picture(in_profile("P3", PATCHES))
    image.putalpha(128)
    image.save(tmp_path / "a.png", icc_profile=rgb_profile("P3"))
    assert abs(patches_of(read(tmp_path / "a.png")) - (PATCHES * 128 + 255 * 127) / 255).max() <= 3


def test_lab_needs_no_profile(tmp_path: Path) -> None:
    lab = Image.merge("LAB", [Image.new("L", (128, 64), value) for value in (140, 128 - 10, 128 + 30)])
    lab.save(tmp_path / "a.tif")
    assert abs(read(tmp_path / "a.tif").pixels[32, 32].astype(int) - lab_to_srgb((140 / 2.55, -10, 30))).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        rgb_profile("P3")[:200],
        b"\xff" * 4000,
        rgb_profile("P3").replace(b"curv", b"abcd"),
        rgb_profile("P3").replace(b"RGB XYZ ", b"abcdXYZ "),
        make_profile(b"GRAY", {b"kTRC": gamma_tag(1.8)}),
        cmyk_profile(),
    ],
)
def test_an_unusable_profile_is_ignored_and_told(profile: bytes, tmp_path: Path) -> None:
    as_picture(PATCHES).save(tmp_path / "a.png", icc_profile=profile)
    frame = read(tmp_path / "a.png")
    assert (patches_of(frame) == PATCHES).all() and frame.color == UNUSABLE


def test_grey_with_a_profile_of_colors_is_converted(tmp_path: Path) -> None:
    Image.new("L", (128, 64), 100).save(tmp_path / "a.png", icc_profile=rgb_profile("P3", 1.8))
    expected = 255 * light_to_srgb(numpy.array([(100 / 255) ** 1.8]))[0]
    assert abs(read(tmp_path / "a.png").pixels.astype(int) - expected).max() <= 1


def test_a_turned_picture_with_a_profile_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = as_picture(in_profile("P3", PATCHES)).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.jpg", icc_profile=rgb_profile("P3"), exif=exif, **SAVE_OPTIONS["jpg"])
    frame = read(tmp_path / "a.jpg")
    assert frame.size == (64, 128) and abs(patches_of(frame) - PATCHES).max() <= 4


def test_a_png_that_names_its_gamut_by_numbers_is_converted(tmp_path: Path) -> None:
    """The chunk cICP: P3 with the curve of sRGB."""
    light = to_gamut(srgb_to_light(PATCHES / 255), "P3")
    as_picture((255 * light_to_srgb(light)).round()).save(tmp_path / "a.png")
    chunk = struct.pack(">I", 4) + b"cICP" + bytes([12, 13, 0, 1])
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + struct.pack(">I", crc32(chunk[4:])) + data[33:])
    frame = read(tmp_path / "a.png")
    assert abs(patches_of(frame) - PATCHES).max() <= 3
    assert frame.color == "P3 to sRGB"
