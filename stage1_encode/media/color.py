"""Decoded frame -> RGB. Ordinary (SDR) frames keep their values; HDR, wide gamuts and linear light become sRGB."""

import re
from dataclasses import dataclass, replace

import av
import numpy
from av.buffer import Buffer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image
from PIL.ImageFile import ImageFile

from stage1_encode.media.icc_profile import UNUSABLE, convert_profile
from stage1_encode.media.tone_mapping import SDR_CURVES, LightSource, render_srgb
from stage1_encode.media.video_frame import UnreadableError

HEAD_BYTES = 2**20  # of a picture; what describes it comes first
UNTAGGED = 2  # FFmpeg's number of an unspecified matrix, curve or gamut
WIDE_CURVES: dict[int, str] = {ColorTrc.ARIB_STD_B67: "HLG", ColorTrc.SMPTE2084: "PQ", ColorTrc.LINEAR: "linear"}
CAMERA_CURVES = (ColorTrc.BT709, ColorTrc.SMPTE170M, ColorTrc.BT2020_10, ColorTrc.BT2020_12)
DOLBY_VISION_TAGS = ("dvh1", "dvhe", "dva1", "dvav", "dav1")
GAMUTS: dict[int, str] = {
    ColorPrimaries.BT2020: "BT.2020",
    ColorPrimaries.SMPTE431: "P3",
    ColorPrimaries.SMPTE432: "P3",
}
# what was done to the colors of a file: a fact of its record, unless the pixels are as they always were
UNTAGGED_AS_601, UNTAGGED_AS_709 = "untagged HD read as BT.601", "untagged HD read as BT.709"
UNREAD_MATRICES = {  # FFmpeg's converter would take them for BT.601
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "YDzDx",
    12: "derived from the primaries",
    13: "derived from the primaries, with constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}


@dataclass(frozen=True)
class ColorRules:
    """What is done where a file leaves a choice; options of `encode`."""

    hdr: str = "tonemap"  # or "refuse"
    untagged_hd: str = "bt601"  # or "bt709": the matrix of HD videos that do not name theirs


EXACT_CONVERSION = Interpolation.BILINEAR | Interpolation.ACCURATE_RND  # FULL_CHR_H_INT would break 4:2:0
DEFAULT_RULES = ColorRules()


def is_changed(color: str) -> bool:
    """Whether what was done to the colors of a file has changed them; else it is only counted."""
    return color not in ("", UNTAGGED_AS_601, UNUSABLE)


def names_wide_color(image: Image.Image) -> bool:
    """Whether an opened PNG or AVIF picture names HDR or a wide gamut by code points (ITU-T H.273), not by a profile.

    Pillow does not look at them: PNG's chunk cICP and the property nclx of AVIF.
    """
    if image.format not in ("PNG", "AVIF") or not isinstance(image, ImageFile) or image.fp is None:
        return False
    position = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(HEAD_BYTES).partition(b"IDAT")[0]
    image.fp.seek(position)
    found = re.search(rb"cICP(..)|colrnclx\0(.)\0(.)", head, re.DOTALL)
    primaries, curve = (found[1] or found[2] + found[3]) if found else (UNTAGGED, UNTAGGED)
    return primaries in GAMUTS or curve in WIDE_CURVES


def is_bare_dolby_vision(tag: str, frame: av.VideoFrame) -> bool:
    """Whether a video, by the tag of its codec, has no colors but those of Dolby Vision (profile 5)."""
    return tag in DOLBY_VISION_TAGS and frame.color_trc == UNTAGGED


def convert_frame(frame: av.VideoFrame, rules: ColorRules) -> tuple[Image.Image, str]:
    """A frame as an RGB or RGBA picture, and what was done to its colors; "" = nothing to tell.

    Raises `UnreadableError` if the colors cannot be read, or must not be.
    """
    if frame.colorspace in UNREAD_MATRICES and not frame.format.is_rgb:
        matrix = UNREAD_MATRICES[frame.colorspace]
        raise UnreadableError(f"has the color matrix {matrix}, which is not read; convert it to BT.709")
    source = find_light_source(frame)
    if source.is_hdr and rules.hdr == "refuse":
        raise UnreadableError(f"is HDR ({source.curve}); convert it to SDR, or give --hdr tonemap")
    if source.gamut != "BT.709" or source.curve not in SDR_CURVES:
        name = source.gamut if source.curve in SDR_CURVES else source.curve
        return _render_light(frame, source), f"{name} to {'SDR' if source.is_hdr else 'sRGB'}"
    color = ""
    if _has_unnamed_matrix(frame) and (frame.width >= 1280 or frame.height > 576):  # players draw the line here
        color = UNTAGGED_AS_709 if rules.untagged_hd == "bt709" else UNTAGGED_AS_601
    assumed = Colorspace.ITU709 if color == UNTAGGED_AS_709 else None
    pixels = _to_array(frame, "rgba" if _has_alpha(frame) else "rgb24", assumed)
    image, profile = Image.fromarray(_expand_grey(frame, pixels)), frame.side_data.get("ICC_PROFILE")
    return convert_profile(image, bytes(profile)) if isinstance(profile, Buffer) and not color else (image, color)


def _to_array(
    frame: av.VideoFrame, form: str, matrix: Colorspace | None, flags: Interpolation | None = None
) -> numpy.ndarray:
    """A frame's pixels in the format `form`; `UnreadableError` if FFmpeg cannot convert them."""
    try:
        # one thread: FFmpeg starts one per core, and the address space that glibc reserves for each fills a reader's
        return frame.to_ndarray(format=form, src_colorspace=matrix, interpolation=flags, threads=1)
    except av.FFmpegError as error:
        raise UnreadableError(f"has pixels that cannot be converted ({error.strerror}); encode it again") from error


def find_light_source(frame: av.VideoFrame) -> LightSource:
    """How the code values of a frame stand for light, by its tags.

    Other gamuts are taken for BT.709. The curve of SDR matters only where a wide gamut is converted.
    """
    gamut = GAMUTS.get(frame.color_primaries, "BT.709")
    is_camera = frame.color_trc in CAMERA_CURVES or (frame.color_trc == UNTAGGED and gamut == "BT.2020")
    curve = WIDE_CURVES.get(frame.color_trc, "BT.709" if is_camera else "sRGB")
    if curve in ("HLG", "PQ") and frame.color_primaries == UNTAGGED:
        gamut = "BT.2020"  # the only one of BT.2100
    return LightSource(curve, gamut)


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(part.is_alpha for part in frame.format.components)


def _has_unnamed_matrix(frame: av.VideoFrame) -> bool:
    """Whether a frame needs a matrix and does not name it."""
    return frame.colorspace == UNTAGGED and len(frame.format.components) >= 3 and not frame.format.is_rgb


def _expand_grey(frame: av.VideoFrame, codes: numpy.ndarray) -> numpy.ndarray:
    """Undo the limited range of a grey frame, which FFmpeg's converter takes for full; others stay as they are."""
    if len(frame.format.components) > 2 or frame.format.has_palette or frame.color_range != ColorRange.MPEG:
        return codes
    top = numpy.iinfo(codes.dtype).max
    unit = (top + 1) // 256
    black, white = 16 * unit, 235 * unit
    expanded = (codes[..., :3].astype(numpy.float32) - black) * (top / (white - black))
    return numpy.concatenate([expanded.round().clip(0, top).astype(codes.dtype), codes[..., 3:]], -1)


def _find_white_code(frame: av.VideoFrame) -> int:
    """The 16-bit code value that FFmpeg's converter gives the white of a frame: not always 65535."""
    bits = min(frame.format.components[0].bits, 16)
    if bits > 8 and (frame.format.is_rgb or len(frame.format.components) < 3):
        return 65535
    is_full = frame.color_range == ColorRange.JPEG and not frame.format.is_rgb
    return ((1 << bits) - 1) << (16 - bits) if is_full else 65283


def _render_light(frame: av.VideoFrame, source: LightSource) -> Image.Image:
    matrix = Colorspace.BT2020 if _has_unnamed_matrix(frame) and source.gamut == "BT.2020" else None
    has_alpha = _has_alpha(frame)
    form = "rgba64le" if has_alpha else "rgb48le"
    frame_codes = _to_array(frame, form, matrix, EXACT_CONVERSION)
    codes = _expand_grey(frame, frame_codes.astype(numpy.uint16, copy=False))
    pixels = render_srgb(codes[..., :3], replace(source, white_code=_find_white_code(frame)))
    if has_alpha:
        pixels = numpy.dstack([pixels, (codes[..., 3] >> 8).astype(numpy.uint8)])
    return Image.fromarray(pixels)
