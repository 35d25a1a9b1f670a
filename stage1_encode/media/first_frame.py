"""Video or picture file -> its first frame, upright, resized and cropped. Shapes: H W pixel height and width.

decord reads ordinary local mp4 and mov files. PyAV reads what decord cannot (AV1, GIF, files on which it fails), may
get wrong (transparency, non-square pixels, rotated frames, several videos) or would scan as a whole before it returns
a frame (files over `MAX_SCANNED_BYTES`, web addresses).
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
except ImportError:  # there is no wheel for every machine
    decord = None
    DECORD_ERRORS = ()

# PyAV accepts metadata that are not UTF-8 since version 19; before, it needs this option
open_leniently = av.open if int(av.__version__.split(".")[0]) >= 19 else partial(av.open, metadata_errors="ignore")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "PPM")  # no EPS: Pillow would start Ghostscript
HEIC_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1")  # FFmpeg would return one tile of the picture
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
DECORD_CODECS = ("h264", "hevc", "mpeg4", "vp9", "mjpeg")
COVER_ART = av.stream.Disposition.attached_pic  # a picture of an album, no video
MAX_SCANNED_BYTES = 4 * 2**20  # decord reads the whole file for one frame: up to here this takes a fifth longer at most
MAX_PIXELS = 2**27  # more than any camera has; larger values mean a corrupt header
UPRIGHT_MATRIX = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # display matrix of an upright mp4
REMOTE_TIMEOUT_SECONDS = 10.0  # without an answer
ORIENTATION_TRANSPOSES = {  # whether a display matrix swaps x and y, mirrors the new x, mirrors the new y
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, True, True): Image.Transpose.TRANSVERSE,
}


class UnreadableError(ValueError):
    """A file has no readable first frame; the message is the reason."""


@dataclass(frozen=True)
class FirstFrame:
    """A resized first frame."""

    pixels: numpy.ndarray  # (H W 3) uint8
    size: tuple[int, int]  # (height, width) of the upright source frame


def read_first_frame(path: str, *, height: int, width: int) -> FirstFrame:
    """Read the first frame of a video or picture file or web address; `UnreadableError` says why it cannot."""
    if not path.startswith(URL_PREFIXES):
        path = str(Path(path).absolute())  # FFmpeg takes what stands before a colon, as in pipe:1, for a protocol
        _check_readable_file(Path(path))
        picture = _read_picture(path)
        if picture is not None:
            return FirstFrame(resize_and_crop(picture, height=height, width=width), (picture.height, picture.width))
    image, aspect = _read_video(path)
    return FirstFrame(resize_and_crop(image, height=height, width=width, aspect=aspect), (image.height, image.width))


def resize_and_crop(image: Image.Image, *, height: int, width: int, aspect: float = 1.0) -> numpy.ndarray:
    """Resize an image to cover (height, width), keeping its aspect, and crop around its centre: (H W 3) uint8.

    `aspect` is the width of a source pixel divided by its height. The filter is antialiased bicubic.
    """
    scale = max(width / (image.width * aspect), height / image.height)
    crop_width, crop_height = width / (scale * aspect), height / scale
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    right, bottom = min(left + crop_width, image.width), min(top + crop_height, image.height)
    box = (max(left, 0.0), max(top, 0.0), right, bottom)  # rounding must not leave the image
    return numpy.asarray(_to_rgb(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: 16-bit greys are scaled, transparent pixels show white."""
    if image.mode.startswith("I"):
        grey = numpy.asarray(image).astype(numpy.float32) / 257  # 65535 / 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(numpy.uint8))
    if image.mode == "F":
        raise UnreadableError("is a floating-point picture, whose white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_readable_file(path: Path) -> None:
    try:
        if not path.exists():
            raise UnreadableError("does not exist")
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


def _read_picture(path: str) -> Image.Image | None:
    """The upright picture in a file; None if it is no picture."""
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            _check_pixels(image.width, image.height)
            return ImageOps.exif_transpose(_to_rgb(image) if image.mode.startswith("I") else image)
    except Image.UnidentifiedImageError:
        return None
    except UnreadableError:  # a ValueError, too
        raise
    except PICTURE_ERRORS as error:
        raise UnreadableError(f"is a broken picture: {error}") from error


def _read_video(path: str) -> tuple[Image.Image, float]:
    """The upright first frame of a video, and the width of its pixels divided by their height."""
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
        except DECORD_ERRORS:  # it fails on some files that FFmpeg reads
            with _open_container(path) as file:
                return _read_with_av(file, _select_video_stream(file))
    except av.FFmpegError as error:
        raise UnreadableError(f"is no readable video: {error.strerror}") from error


def _open_container(path: str) -> av.container.InputContainer:
    """Open a container by its header alone; FFmpeg probes further only if the header lacks the size."""
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
    """Whether decord returns the right frame of a video and finds it quickly."""
    if decord is None or path.startswith(URL_PREFIXES) or Path(path).stat().st_size > MAX_SCANNED_BYTES:
        return False
    if not file.format.name.startswith("mov,") or len(file.streams.video) > 1 or not _is_upright(Path(path)):
        return False
    (stream,) = file.streams.video
    is_opaque = stream.format is None or not any(part.is_alpha for part in stream.format.components)
    return is_opaque and stream.sample_aspect_ratio in (None, 0, 1) and stream.codec_context.name in DECORD_CODECS


def _is_upright(path: Path) -> bool:
    """Whether no track of an mp4 file is rotated or mirrored; PyAV knows only after it has decoded a frame."""
    data = path.read_bytes()
    return data.count(UPRIGHT_MATRIX) > data.count(b"tkhd")  # one matrix per track header, one of the whole file


def _read_with_decord(path: str) -> Image.Image:
    reader = decord.VideoReader(path, num_threads=1)
    pixels = reader[0].asnumpy().copy()
    del reader  # an open reader decodes ahead without limit
    return Image.fromarray(pixels)


def _read_with_av(file: av.container.InputContainer, stream: VideoStream) -> tuple[Image.Image, float]:
    """The upright first frame by PyAV, and the width of its pixels divided by their height."""
    frame = _decode_first_frame(file, stream)
    _check_pixels(frame.width, frame.height)
    image = _frame_to_image(frame)
    aspect, orientation = float(stream.sample_aspect_ratio or 1), _display_orientation(frame)
    transpose = ORIENTATION_TRANSPOSES.get(orientation)
    return (image if transpose is None else image.transpose(transpose)), 1 / aspect if orientation[0] else aspect


def _frame_to_image(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame as it is stored: 8-bit RGB, or RGBA if it has transparency."""
    has_alpha = any(part.is_alpha for part in frame.format.components)
    return Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24"))


def _display_orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether a frame's display matrix swaps x and y, mirrors the new x, and mirrors the new y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, Buffer):
        return False, False, False
    xx, xy, _, yx, yy, *_ = struct.unpack("9i", bytes(matrix))  # x, y -> x xx + y yx, x xy + y yy
    swapped = abs(xy) > abs(xx)
    return (True, yx < 0, xy < 0) if swapped else (False, xx < 0, yy < 0)


def _decode_first_frame(file: av.container.InputContainer, stream: VideoStream) -> av.VideoFrame:
    stream.thread_type = "NONE"  # threads would decode further frames
    decoder = stream.codec_context
    for packet in file.demux(stream):
        if packet.is_corrupt:
            raise UnreadableError("is cut off within its first frame")
        frames = decoder.decode(packet)
        if not frames and packet.is_keyframe and packet.pts is not None and packet.pts == stream.start_time:
            frames = decoder.decode(None)  # no frame is shown before this one, so it is returned without the next ones
            decoder.flush_buffers()
        if frames and frames[0].is_corrupt:
            raise UnreadableError("is damaged within its first frame")
        if frames:
            return frames[0]
    raise UnreadableError("holds no frame")
