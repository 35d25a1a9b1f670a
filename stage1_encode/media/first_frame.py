"""Video or picture file -> its first frame, upright, resized and cropped. Shapes: H W pixel height and width.

PyAV reads videos, since it reports damage; decord conceals it. decord, with an FFmpeg of its own, reads local files for
whose codec PyAV has no decoder, such as H.264 where PyAV was built without it. Pillow reads pictures.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import av
import numpy
from PIL import ExifTags, Image, ImageOps

from stage1_encode.media.color import DEFAULT_RULES, ColorRules, convert_frame, is_bare_dolby_vision, names_wide_color
from stage1_encode.media.icc_profile import convert_profile
from stage1_encode.media.rows import URL_PREFIXES, explain_missing_file
from stage1_encode.media.video_frame import (
    NoDecoderError,
    UnreadableError,
    decode_first_frame,
    display_orientation,
    open_video,
)

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    DECORD_ERRORS: tuple[type[Exception], ...] = (decord.DECORDError, RuntimeError, IndexError)
except ImportError:  # there is no wheel for every machine
    decord = None
    DECORD_ERRORS = ()

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "PPM")  # no EPS: Pillow would start Ghostscript
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
EMPTINESS_ROWS = 32  # looked at; enough to see whether a frame shows anything, and quick
BLACK_LEVEL, UNIFORM_RANGE = 20, 8  # of 255: compressed black and compressed grey are not exact
ORIENTATION_TAG, TURNED_ORIENTATIONS = ExifTags.Base.Orientation, (5, 6, 7, 8)  # of EXIF: width and height swapped
MAX_PIXELS = 2**27  # more than any camera has; larger values mean a corrupt header
ORIENTATION_TRANSPOSES = {  # whether a display matrix swaps x and y, mirrors the new x, mirrors the new y
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, True, True): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class FirstFrame:
    """A resized first frame."""

    pixels: numpy.ndarray  # (H W 3) uint8
    size: tuple[int, int]  # (height, width) of the upright source frame
    color: str = ""  # what was done to its colors; "" = nothing to tell
    aspect: float = 1.0  # width of a pixel of the source divided by its height

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the source as displayed."""
        return displayed_shape(self.size, self.aspect)

    @property
    def crop(self) -> tuple[float, float, float, float]:
        """What is shown of the upright source: (top, left, height, width) in its pixels, to a hundredth."""
        left, top, right, bottom = crop_box(self.size, self.pixels.shape[:2], self.aspect)
        return round(top, 2), round(left, 2), round(bottom - top, 2), round(right - left, 2)

    @property
    def enlargement(self) -> float:
        """How many pixels are made of one of the source, in the direction where they are more."""
        left, top, right, bottom = crop_box(self.size, self.pixels.shape[:2], self.aspect)
        return max(self.pixels.shape[0] / (bottom - top), self.pixels.shape[1] / (right - left))

    @property
    def emptiness(self) -> str:
        """What a frame shows that shows nothing, for a report; "" = it shows something."""
        stride = max(1, len(self.pixels) // EMPTINESS_ROWS)
        samples = self.pixels[::stride, ::stride].reshape(-1, 3)
        low, high = numpy.quantile(samples, (0.005, 0.995), axis=0)  # a few bright points are no picture
        if high.max() <= BLACK_LEVEL:
            return "black first frame"
        return "first frame of a single color" if (high - low).max() <= UNIFORM_RANGE else ""


@dataclass(frozen=True)
class SourceImage:
    """An upright first frame in its own size."""

    image: Image.Image
    aspect: float = 1.0  # width of a pixel divided by its height
    color: str = ""  # as in `FirstFrame`


@dataclass(frozen=True)
class DecodedFrame:
    """The first frame of a video as it is stored."""

    frame: av.VideoFrame
    aspect: float  # width of a stored pixel divided by its height
    codec_tag: str


def read_first_frame(path: str, *, height: int, width: int, rules: ColorRules = DEFAULT_RULES) -> FirstFrame:
    """Read the first frame of a video or picture file or web address; `UnreadableError` says why it cannot."""
    picture, path = None, _checked_path(path)
    if not path.startswith(URL_PREFIXES):
        with Path(path).open("rb") as file:  # Pillow maps a file that it opens itself, and reads turned TIFFs wrong
            picture = _read_picture(file)
    source = picture or _read_video(path, rules)
    pixels = resize_and_crop(source.image, height=height, width=width, aspect=source.aspect)
    return FirstFrame(pixels, (source.image.height, source.image.width), source.color, source.aspect)


def read_displayed_shape(path: str) -> tuple[int, int]:
    """(height, width) at which a file is displayed, as `FirstFrame.shape`; `UnreadableError` as `read_first_frame`.

    Of a picture this reads the header alone. Of a video it decodes the first frame, which only tells how it is turned.
    """
    path = _checked_path(path)
    if not path.startswith(URL_PREFIXES):
        with Path(path).open("rb") as file:
            shape = _read_picture_shape(file)
        if shape is not None:
            return shape
    source = _decode_video(path)
    if isinstance(source, SourceImage):
        return displayed_shape((source.image.height, source.image.width), source.aspect)
    size, aspect = (source.frame.height, source.frame.width), source.aspect
    is_swapped = display_orientation(source.frame)[0]
    return displayed_shape(size[::-1], 1 / aspect) if is_swapped else displayed_shape(size, aspect)


def displayed_shape(size: tuple[int, int], aspect: float) -> tuple[int, int]:
    """(height, width) of square pixels that show a picture of (height, width) pixels of another aspect."""
    return (size[0], round(size[1] * aspect)) if aspect >= 1 else (round(size[0] / aspect), size[1])


def crop_box(size: tuple[int, int], target: tuple[int, ...], aspect: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest part of `size` around its centre that has the shape of `target`.

    Both are (height, width), the box is in pixels of `size`, which are `aspect` times as wide as high.
    """
    scale = max(target[1] / (size[1] * aspect), target[0] / size[0])
    crop_width, crop_height = target[1] / (scale * aspect), target[0] / scale
    left, top = (size[1] - crop_width) / 2, (size[0] - crop_height) / 2
    right, bottom = min(left + crop_width, size[1]), min(top + crop_height, size[0])
    return max(left, 0.0), max(top, 0.0), right, bottom  # rounding must not leave the image


def resize_and_crop(image: Image.Image, *, height: int, width: int, aspect: float = 1.0) -> numpy.ndarray:
    """Resize an image to cover (height, width), keeping its aspect, and crop around its centre: (H W 3) uint8.

    `aspect` is the width of a source pixel divided by its height. The filter is antialiased bicubic.
    """
    box = crop_box((image.height, image.width), (height, width), aspect)
    return numpy.asarray(_to_rgb(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys; other modes of Pillow have 8 bits, apart from one that is refused."""
    if image.mode == "F":
        raise UnreadableError("is a floating-point picture, whose white is unknown")
    if not image.mode.startswith("I"):
        return image
    grey = numpy.asarray(image).astype(numpy.float32) / 257  # 65535 / 255
    return Image.fromarray(grey.round().clip(0, 255).astype(numpy.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; transparent pixels show white."""
    image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _checked_path(path: str) -> str:
    """A web address as it is, or the absolute path of a file that can be read; else `UnreadableError`."""
    if path.startswith(URL_PREFIXES):
        return path
    path = str(Path(path).absolute())  # FFmpeg takes what stands before a colon, as in pipe:1, for a protocol
    _check_readable_file(Path(path))
    return path


def _check_readable_file(path: Path) -> None:
    try:
        if not path.exists():
            raise UnreadableError(explain_missing_file(str(path)))
        if not path.is_file():  # opening a pipe would wait for a writer
            raise UnreadableError("is a folder" if path.is_dir() else "is no ordinary file")
        with path.open("rb") as file:
            if not file.read(1):
                raise UnreadableError("is empty")
    except OSError as error:
        raise UnreadableError(f"cannot be opened: {error.strerror}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"claims {width} x {height} pixels")


def _read_picture(file: BinaryIO) -> SourceImage | None:
    """The upright picture in a file; None if it is no picture, or one whose colors only FFmpeg knows."""
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            _check_pixels(image.width, image.height)
            if names_wide_color(image):
                return None
            upright = _to_eight_bits(ImageOps.exif_transpose(image))
            converted, color = convert_profile(upright, image.info.get("icc_profile"))
            return SourceImage(converted, color=color)
    except Image.UnidentifiedImageError:
        return None
    except UnreadableError:  # a ValueError, too
        raise
    except PICTURE_ERRORS as error:
        raise UnreadableError(f"is a broken picture: {error}") from error


def _read_picture_shape(file: BinaryIO) -> tuple[int, int] | None:
    """(height, width) of the upright picture in a file; None if `_read_picture` would return none."""
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            _check_pixels(image.width, image.height)
            if names_wide_color(image):
                return None
            is_turned = image.getexif().get(ORIENTATION_TAG, 1) in TURNED_ORIENTATIONS
            if is_turned and image.format == "TIFF":  # whether its size is that as stored depends on Pillow's version
                upright = ImageOps.exif_transpose(image)
                return upright.height, upright.width
            return (image.width, image.height) if is_turned else (image.height, image.width)
    except Image.UnidentifiedImageError:
        return None
    except UnreadableError:
        raise
    except PICTURE_ERRORS as error:
        raise UnreadableError(f"is a broken picture: {error}") from error


def _read_video(path: str, rules: ColorRules) -> SourceImage:
    source = _decode_video(path)
    if isinstance(source, SourceImage):
        return source
    return show_frame(source, rules)


def show_frame(source: DecodedFrame, rules: ColorRules) -> SourceImage:
    """A decoded frame as it is displayed; `UnreadableError` if nothing can show it."""
    frame, aspect = source.frame, source.aspect
    if is_bare_dolby_vision(source.codec_tag, frame):
        raise UnreadableError("is Dolby Vision that nothing else can show (profile 5); convert it to HDR10 or SDR")
    (image, color), orientation = convert_frame(frame, rules), display_orientation(frame)
    transpose = ORIENTATION_TRANSPOSES.get(orientation)
    upright = image if transpose is None else image.transpose(transpose)
    return SourceImage(upright, 1 / aspect if orientation[0] else aspect, color)


def _decode_video(path: str) -> DecodedFrame | SourceImage:
    """The first frame of a video by PyAV; by Pillow if it is a single picture on the web; else by decord."""
    try:
        with open_video(path) as video:
            _check_pixels(video.stream.width, video.stream.height)
            packets: Iterable[av.Packet] = video.file.demux(video.stream)
            if video.file.format.name.endswith("_pipe"):  # a single picture, on the web
                packets = list(packets)
                picture = _read_picture(BytesIO(b"".join(map(bytes, packets))))
                if picture is not None:
                    return picture
            frame, aspect = decode_first_frame(video, packets), float(video.stream.sample_aspect_ratio or 1)
    except NoDecoderError:
        image = _read_with_decord(path)
        if image is None:
            raise
        return SourceImage(image)
    except av.FFmpegError as error:
        raise UnreadableError(f"is no readable video: {error.strerror}") from error
    _check_pixels(frame.width, frame.height)
    return DecodedFrame(frame, aspect, video.stream.codec_context.codec_tag)


def _read_with_decord(path: str) -> Image.Image | None:
    """The first frame by decord; None if it cannot read the file, which may be for the same reason as PyAV's."""
    if decord is None or path.startswith(URL_PREFIXES):
        return None
    try:
        reader = decord.VideoReader(path, num_threads=1)
        pixels = reader[0].asnumpy().copy()
    except DECORD_ERRORS:
        return None
    del reader  # an open reader decodes ahead without limit
    return Image.fromarray(pixels)
