"""Video in a container -> its first displayed frame, complete, and how it is turned. FFmpeg's decoders conceal damage:
they return a frame with invented parts and tell of it only by a flag or in their log, so both are read here.
"""

import logging
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial

import av
from av.buffer import Buffer
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from stage1_encode.media.rows import URL_PREFIXES

# PyAV accepts metadata that are not UTF-8 since version 19; before, it needs this option
open_leniently = av.open if int(av.__version__.split(".")[0]) >= 19 else partial(av.open, metadata_errors="ignore")
HEIC_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1")  # FFmpeg would return one tile of the picture
COVER_ART = av.stream.Disposition.attached_pic  # a picture of an album, no video
REMOTE_TIMEOUT_SECONDS = 10.0  # without an answer
DECODER_OPTIONS = {"err_detect": "crccheck"}  # compares the checksums that some streams hold
HARMLESS_COMPLAINT = re.compile("SEI|APP|EXIF|VUI|mmco", re.IGNORECASE)  # these say nothing of the picture
CORRUPT_PACKET = "Packet corrupt (stream = {}, dts = {})"  # in the log, as FFmpeg's parsers drop the packet's flag
UNKNOWN_CODEC = re.compile(r"Video: (?:none \()?([^\s,]+)")  # the log names the codec or its tag, PyAV does not
# These codecs never write a long run of zeros, which a hole in a file or a lost block leaves and no decoder reports.
DENSE_CODECS = ("h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d")
HOLE = bytes(256)

av.logging.set_level(av.logging.WARNING)  # otherwise nothing can be captured
av.logging.set_skip_repeated(False)  # or damage equal to the previous file's would go unreported
logging.getLogger("libav").setLevel(logging.CRITICAL)  # what is not captured need not be printed


class UnreadableError(ValueError):
    """A file has no readable first frame; the message is the reason."""


def _stand_in(cls: type[Enum], value: object) -> Enum:
    return cls["VIDEO_HINT"]


# PyAV fails for all side data of a frame if it does not know the type of one of them, such as EXIF
Type._missing_ = classmethod(_stand_in)  # type: ignore[assignment]


class NoDecoderError(UnreadableError):
    """A file is sound, but its codec is unknown."""


@dataclass(frozen=True)
class OpenVideo:
    """An open container, its main video and what FFmpeg has said so far: (level, source, message)."""

    file: InputContainer
    stream: VideoStream
    log: list[tuple[int, str, str]]


@contextmanager
def open_video(path: str) -> Iterator[OpenVideo]:
    """Open a file or web address; `NoDecoderError` if its codec is unknown, `UnreadableError` if it has no video."""
    with av.logging.Capture() as log, _open_container(path) as file:
        yield OpenVideo(file, _select_stream(file, log), log)


def _open_container(path: str) -> InputContainer:
    """Open a container by its header alone; FFmpeg probes further only if the header lacks the size."""
    timeout = REMOTE_TIMEOUT_SECONDS if path.startswith(URL_PREFIXES) else None
    try:
        file = open_leniently(path, options={"probesize": "32"}, timeout=timeout)
        decodable = [stream for stream in file.streams.video if stream.codec_context is not None]
        if decodable and all(stream.width for stream in decodable):
            return file
        file.close()
    except av.InvalidDataError:
        pass
    return open_leniently(path, timeout=timeout)


def _select_stream(file: InputContainer, log: list[tuple[int, str, str]]) -> VideoStream:
    has_tiles = any(stream.disposition & av.stream.Disposition.dependent for stream in file.streams.video)
    if has_tiles or file.metadata.get("major_brand") in HEIC_BRANDS:
        raise UnreadableError("is a HEIC picture; save it as JPEG")
    videos = [stream for stream in file.streams.video if not stream.disposition & COVER_ART]
    if not videos:
        raise UnreadableError("has no video stream")
    decodable = [stream for stream in videos if stream.codec_context is not None]
    if not decodable:
        names = [match[1] for _, _, message in log if (match := UNKNOWN_CODEC.search(message)) and match[1] != "none"]
        name = f"the codec {names[0]}" if names else f"an unknown codec ({file.format.long_name})"
        raise NoDecoderError(f"is in {name}, for which there is no decoder; convert it to H.264, or a picture to PNG")
    best_stream = file.streams.best("video")
    return next((stream for stream in decodable if stream is best_stream), decodable[0])


def display_orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether the display matrix of a frame's stream swaps x and y, mirrors the new x, and mirrors the new y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, Buffer):
        return False, False, False
    xx, xy, _, yx, yy, *_ = struct.unpack("9i", bytes(matrix))  # x, y -> x xx + y yx, x xy + y yy
    return (True, yx < 0, xy < 0) if abs(xy) > abs(xx) else (False, xx < 0, yy < 0)


def decode_first_frame(video: OpenVideo, packets: Iterable[av.Packet]) -> av.VideoFrame:
    """The frame that is displayed first, complete; `UnreadableError` if it is damaged, cut off or missing.

    A stream may be cut out of a longer one: frames that its decoder complains of are skipped up to the key frame.
    """
    video.stream.thread_type = "NONE"  # threads would decode further frames
    video.stream.codec_context.options = DECODER_OPTIONS
    key, is_key_damaged, has_complaints = None, False, False
    for packet in packets:
        frames, complains = _decode(video, packet)
        if packet.is_corrupt and (key is None or packet.is_keyframe):
            raise UnreadableError("is cut off within its first frame")
        complains |= not _is_whole(video, packet)
        has_complaints |= complains
        if key is None and packet.is_keyframe:
            key, is_key_damaged = packet, complains
            if not frames and packet.pts is not None and packet.pts == video.stream.start_time:
                frames = _drain(video, packet)  # no frame is displayed before this one, so none is waited for
        for frame in frames:
            is_sound = not frame.is_corrupt and _is_filled(frame)
            if is_key_damaged or (frame.key_frame and not is_sound):
                raise UnreadableError("is damaged within its first frame")
            if is_sound and (frame.key_frame or not has_complaints):
                return frame
    state = "its first frame cannot be decoded" if key else "it holds no key frame"
    raise UnreadableError(f"is no readable video: {state}")


def _is_filled(frame: av.VideoFrame) -> bool:
    """Whether a decoder has written a frame to its end: FFmpeg hands out zeros, which are no colour in YUV."""
    if not frame.format.name.startswith("yuv"):
        return True
    sample_size = 1 + (frame.format.components[0].bits > 8)
    ends = (memoryview(plane)[-plane.line_size :][: plane.width * sample_size] for plane in frame.planes[:2])
    return any(any(end[-8:]) for end in ends)


def _is_whole(video: OpenVideo, packet: av.Packet) -> bool:
    """Whether a packet is complete, as far as the container and the codec show."""
    report = CORRUPT_PACKET.format(packet.stream_index, packet.dts)
    # A hole in a transport stream loses its packets, and zeros within them are padding.
    is_dense = video.stream.codec_context.name in DENSE_CODECS and video.file.format.name != "mpegts"
    has_hole = is_dense and HOLE in bytes(packet)
    return not (packet.is_corrupt or has_hole or any(message.startswith(report) for _, _, message in video.log))


def _decode(video: OpenVideo, packet: av.Packet | None) -> tuple[list[av.VideoFrame], bool]:
    """The frames that the decoder returns for a packet, or at the end for None, and whether it complains."""
    start = len(video.log)
    try:
        frames = video.stream.codec_context.decode(packet)
    except av.FFmpegError:
        return [], True
    errors = (message for level, _, message in video.log[start:] if level <= av.logging.ERROR)
    return frames, not all(HARMLESS_COMPLAINT.search(message) for message in errors)


def _drain(video: OpenVideo, packet: av.Packet) -> list[av.VideoFrame]:
    """The frame of a packet that the decoder holds back until it sees the next ones."""
    frames, _ = _decode(video, None)
    video.stream.codec_context.flush_buffers()
    if frames and not frames[0].interlaced_frame:
        return frames
    _decode(video, packet)  # perhaps one field of two, and the next packet has the other
    return []
