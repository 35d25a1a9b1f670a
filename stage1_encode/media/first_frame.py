"""Video or picture file -> its first frame, upright, cropped to the wanted size. Shapes: H W pixels.

decord reads ordinary local mp4 and mov files. PyAV reads what decord cannot (AV1, GIF, whatever it gives up on), may
get wrong (transparency, wide pixels, turned or mirrored frames, one of several videos) or would scan whole before it
gives a frame (files over `SCANNED` bytes, web addresses).
"""

import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy
from av.buffer import Buffer
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from stage1_encode.media.rows import URL_PREFIXES

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    DECORD_ERRORS: tuple[type[Exception], ...] = (decord.DECORDError, RuntimeError, IndexError)
except ImportError:  # no wheel for this machine
    decord = None
    DECORD_ERRORS = ()

# PyAV 19 keeps bytes that are no UTF-8 and has no option for it; before, they made a file unreadable
open_leniently = av.open if int(av.__version__.split(".")[0]) >= 19 else partial(av.open, metadata_errors="ignore")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "PPM")  # EPS and the like would start a program
HEIC_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1")  # brands; FFmpeg would give one tile of the picture
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp9", "mjpeg")
COVER_ART = av.stream.Disposition.attached_pic  # of an album: no video
MAX_SCANNED_BYTES = (
    4 * 2**20
)  # bytes up to which decord may read the whole file to find one frame: a fifth more time at most
MAX_PIXELS = 2**27  # more than any camera makes; above it a header lies
UPRIGHT_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # a display matrix of an mp4
ORIENTATION_TRANSPOSES = {  # whether a display matrix swaps x and y, and turns round the new x and y
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
REMOTE_TIMEOUT_SECONDS = 10.0  # seconds without an answer


class UnreadableError(ValueError):
    """A file that gives no first frame, and why."""


@dataclass(frozen=True)
class FirstFrame:
    """A first frame."""

    pixels: numpy.ndarray  # (H W 3) uint8
    size: tuple[int, int]  # (height, width) of the upright source frame


def read_first_frame(path: str, *, height: int, width: int) -> FirstFrame:
    """Read the first frame of a video or picture file; `UnreadableError` says why it cannot."""
    if not path.startswith(URL_PREFIXES):
        _check_readable_file(Path(path))
        picture = _read_picture(path)
        if picture is not None:
            return FirstFrame(resize_and_crop(picture, height=height, width=width), (picture.height, picture.width))
    image, aspect = _read_video(path)
    return FirstFrame(resize_and_crop(image, height=height, width=width, aspect=aspect), (image.height, image.width))


def resize_and_crop(image: Image.Image, *, height: int, width: int, aspect: float = 1.0) -> numpy.ndarray:
    """Resize an image so that it covers (height, width), aspect kept, and crop around its centre; (H W 3) uint8.

    `aspect` is the width of one source pixel over its height. Antialiased bicubic.
    """
    scale = max(width / (image.width * aspect), height / image.height)
    crop_width, crop_height = width / (scale * aspect), height / scale
    crop_left, crop_top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (
        max(crop_left, 0.0),
        max(crop_top, 0.0),
        min(crop_left + crop_width, image.width),
        min(crop_top + crop_height, image.height),
    )
    return numpy.asarray(_to_rgb(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit greys are scaled, transparency lies on white."""
    if image.mode.startswith("I"):
        grey = numpy.asarray(image).astype(numpy.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(numpy.uint8))
    if image.mode == "F":
        raise UnreadableError("is a floating-point picture, whose white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_readable_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise UnreadableError(
                "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
            )
        with path.open("rb") as file:
            if not file.read(1):
                raise UnreadableError("is empty")
    except OSError as error:
        raise UnreadableError(f"cannot be opened: {error.strerror}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"claims {width} x {height} pixels")


def _read_picture(path: str) -> Image.Image | None:
    """The picture in a file, upright; None where it is no picture."""
    try:
        image = Image.open(path, formats=PICTURE_FORMATS)
    except Image.UnidentifiedImageError:
        return None
    except PICTURE_ERRORS as error:
        raise UnreadableError(f"is a broken picture: {error}") from error
    with image:
        _check_pixels(image.width, image.height)
        try:
            return ImageOps.exif_transpose(_to_rgb(image) if image.mode.startswith("I") else image)
        except PICTURE_ERRORS as error:
            raise UnreadableError(f"is a broken picture: {error}") from error


def _read_video(path: str) -> tuple[Image.Image, float]:
    """The first frame of a video, upright, and the width of its pixels over their height."""
    try:
        with _open_container(path) as file:
            stream = _select_video_stream(file)
            _check_pixels(stream.width, stream.height)
            if not _is_decord_safe(path, file):
                return _read_with_av(file, stream)
            if next(file.demux(stream)).is_corrupt:
                raise UnreadableError("is cut off within its first frame")
        try:
            return _read_with_decord(path), 1.0
        except DECORD_ERRORS:  # it cannot read all that it should
            with _open_container(path) as file:
                return _read_with_av(file, _select_video_stream(file))
    except av.FFmpegError as error:
        raise UnreadableError(f"is no readable video: {error.strerror}") from error


def _open_container(path: str) -> av.container.InputContainer:
    """Open a container by what its header says; decode a part of it only where that is too little."""
    timeout = REMOTE_TIMEOUT_SECONDS if path.startswith(URL_PREFIXES) else None
    try:
        file = open_leniently(path, options={"probesize": "32"}, timeout=timeout)
        if file.streams.video and all(stream.width for stream in file.streams.video):
            return file
        file.close()
    except av.InvalidDataError:
        pass
    return open_leniently(path, timeout=timeout)


def _select_video_stream(file: av.container.InputContainer) -> VideoStream:
    has_tiles = any(stream.disposition & av.stream.Disposition.dependent for stream in file.streams.video)
    if has_tiles or file.metadata.get("major_brand") in HEIC_BRANDS:
        raise UnreadableError("is a HEIC picture; save it as JPEG")
    videos = [stream for stream in file.streams.video if not stream.disposition & COVER_ART]
    if not videos:
        raise UnreadableError("has no video stream")
    best_stream = file.streams.best("video")
    return next((stream for stream in videos if stream is best_stream), videos[0])


def _is_decord_safe(path: str, file: av.container.InputContainer) -> bool:
    """Whether decord gives the right frame of a video and finds it without reading for long."""
    if decord is None or path.startswith(URL_PREFIXES) or Path(path).stat().st_size > MAX_SCANNED_BYTES:
        return False
    if not file.format.name.startswith("mov,") or len(file.streams.video) > 1 or not _is_upright(Path(path)):
        return False
    (stream,) = file.streams.video
    is_opaque = stream.format is None or not any(part.is_alpha for part in stream.format.components)
    return is_opaque and stream.sample_aspect_ratio in (None, 0, 1) and stream.codec_context.name in DECORD_CODECS


def _is_upright(path: Path) -> bool:
    """Whether nothing turns or mirrors the tracks of an mp4 file; PyAV tells only once it has decoded a frame."""
    data = path.read_bytes()
    return data.count(UPRIGHT_MATRIX) > data.count(b"tkhd")  # the file has a matrix, too


def _read_with_decord(path: str) -> Image.Image:
    reader = decord.VideoReader(path, num_threads=1)
    pixels = reader[0].asnumpy().copy()
    del reader  # an open one decodes ahead without bound
    return Image.fromarray(pixels)


def _read_with_av(file: av.container.InputContainer, stream: VideoStream) -> tuple[Image.Image, float]:
    """The first frame by PyAV, upright, and the width of its pixels over their height."""
    frame = _decode_first_frame(file, stream)
    _check_pixels(frame.width, frame.height)
    has_alpha = any(part.is_alpha for part in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24"))
    aspect, orientation = float(stream.sample_aspect_ratio or 1), _display_orientation(frame)
    transpose = ORIENTATION_TRANSPOSES.get(orientation)
    return (image if transpose is None else image.transpose(transpose)), 1 / aspect if orientation[0] else aspect


def _display_orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether a frame's display matrix swaps x and y, and turns round the new x and y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, Buffer):
        return False, False, False
    xx, xy, _, yx, yy, *_ = struct.unpack("9i", bytes(matrix))  # x, y -> x xx + y yx, x xy + y yy
    swapped = abs(xy) > abs(xx)
    return (True, yx < 0, xy < 0) if swapped else (False, xx < 0, yy < 0)


def _decode_first_frame(file: av.container.InputContainer, stream: VideoStream) -> av.VideoFrame:
    stream.thread_type = "NONE"  # threads decode ahead
    decoder = stream.codec_context
    for packet in file.demux(stream):
        if packet.is_corrupt:
            raise UnreadableError("is cut off within its first frame")
        frames = decoder.decode(packet)
        if not frames and packet.is_keyframe and packet.pts is not None and packet.pts == stream.start_time:
            frames = decoder.decode(None)  # nothing is shown before it: do not wait for the frames after it
            decoder.flush_buffers()
        if frames and frames[0].is_corrupt:
            raise UnreadableError("is damaged within its first frame")
        if frames:
            return frames[0]
    raise UnreadableError("holds no frame")
