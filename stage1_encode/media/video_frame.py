"""Video in a container -> its first displayed frame, complete, and how it is turned. FFmpeg's decoders conceal damage:
they return a frame with invented parts and tell of it only by a flag or in their log, so both are read here.
"""

import logging
import re
import struct
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial

import av
from av.buffer import Buffer
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from stage1_encode.media.rows import URL_PREFIXES

# PyAV accepts metadata that are not UTF-8 since version 19; before, it needs this option
open_leniently = av.open if int(av.__version__.split(".")[0]) >= 19 else partial(av.open, metadata_errors="ignore")
HEIC_BRANDS = ("heic", "heix", "hevc", "hevx", "mif1", "msf1")  # FFmpeg would return one tile of the picture
COVER_ART = av.stream.Disposition.attached_pic  # a picture of an album, no video
REMOTE_TIMEOUT_SECONDS = 10.0  # without an answer
DECODER_OPTIONS = {"err_detect": "crccheck"}  # compares the checksums that some streams hold
HARMLESS_COMPLAINT = re.compile("SEI|APP|EXIF|VUI|mmco", re.IGNORECASE)  # these say nothing of the picture
CORRUPT_PACKET = re.compile(r"Packet corrupt \(stream = (\d+)")  # FFmpeg's parsers drop the flag of the packet
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


def open_container(path: str) -> InputContainer:
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


def select_video_stream(file: InputContainer) -> VideoStream:
    """The main video of a container; `NoDecoderError` if it is of an unknown codec, `UnreadableError` if missing."""
    has_tiles = any(stream.disposition & av.stream.Disposition.dependent for stream in file.streams.video)
    if has_tiles or file.metadata.get("major_brand") in HEIC_BRANDS:
        raise UnreadableError("is a HEIC picture; save it as JPEG")
    videos = [stream for stream in file.streams.video if not stream.disposition & COVER_ART]
    if not videos:
        raise UnreadableError("has no video stream")
    decodable = [stream for stream in videos if stream.codec_context is not None]
    if not decodable:
        remedy = "for which there is no decoder; convert it to H.264, or a picture to PNG"
        raise NoDecoderError(f"is in {_name_codec(file)}, {remedy}")
    best_stream = file.streams.best("video")
    return next((stream for stream in decodable if stream is best_stream), decodable[0])


def _name_codec(file: InputContainer) -> str:
    """The name or tag of a codec that PyAV leaves unnamed, or else the format of the container."""
    with av.logging.Capture() as log:
        open_leniently(file.name).close()
    names = [match[1] for _, _, message in log if (match := UNKNOWN_CODEC.search(message)) and match[1] != "none"]
    return f"the codec {names[0]}" if names else f"an unknown codec ({file.format.long_name})"


def display_orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether the display matrix of a frame's stream swaps x and y, mirrors the new x, and mirrors the new y."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, Buffer):
        return False, False, False
    xx, xy, _, yx, yy, *_ = struct.unpack("9i", bytes(matrix))  # x, y -> x xx + y yx, x xy + y yy
    return (True, yx < 0, xy < 0) if abs(xy) > abs(xx) else (False, xx < 0, yy < 0)


def decode_first_frame(stream: VideoStream, packets: Iterable[av.Packet]) -> av.VideoFrame:
    """The frame of a stream that is displayed first, complete; `UnreadableError` if it is damaged, cut off or missing.

    A stream may be cut out of a longer one. What it holds before its first key frame, or refers to what was before,
    is not displayed by players either if its decoder complains.
    """
    stream.thread_type = "NONE"  # threads would decode further frames
    decoder, has_complaints = stream.codec_context, False
    decoder.options = DECODER_OPTIONS
    key, is_key_damaged = None, False
    for packet, is_whole in _check_packets(stream, iter(packets)):
        frames, complains = _decode(decoder, packet)
        complains |= not is_whole
        has_complaints |= complains
        if key is None and packet.is_keyframe:
            key, is_key_damaged, has_complaints = packet, complains, complains  # what came before does not count
            if not frames and packet.pts is not None and packet.pts == stream.start_time:
                frames = _drain(decoder, packet)  # no frame is displayed before this one, so none is waited for
        for frame in frames:
            is_damaged = frame.is_corrupt or has_complaints
            if key is not None and not _is_earlier(frame, key):
                is_damaged = frame.is_corrupt or is_key_damaged  # complaints of other frames do not matter any more
                if is_damaged:
                    raise UnreadableError("is damaged within its first frame")
            if not is_damaged:
                return frame
    problem = "its first frame cannot be decoded" if has_complaints else "it holds no complete frame"
    raise UnreadableError(f"is no readable video: {problem}")


def _is_earlier(frame: av.VideoFrame, key: av.Packet) -> bool:
    return frame.pts is not None and key.pts is not None and frame.pts < key.pts


def _check_packets(stream: VideoStream, packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, bool]]:
    """The packets of a stream, and whether each is whole as far as the container and the codec show."""
    is_dense = stream.codec_context.name in DENSE_CODECS
    while True:
        with av.logging.Capture() as log:
            packet = next(packets, None)
        if packet is None:
            return
        reports = (CORRUPT_PACKET.match(message) for _, _, message in log)
        is_reported = any(report and int(report[1]) == stream.index for report in reports)
        has_hole = is_dense and HOLE in bytes(packet)
        if packet.is_corrupt and packet.is_keyframe:
            raise UnreadableError("is cut off within its first frame")
        yield packet, not (packet.is_corrupt or is_reported or has_hole)


def _decode(decoder: VideoCodecContext, packet: av.Packet | None) -> tuple[list[av.VideoFrame], bool]:
    """The frames that a decoder returns for a packet, or at the end for None, and whether it complains."""
    with av.logging.Capture() as log:
        try:
            frames = decoder.decode(packet)
        except av.FFmpegError:
            return [], True
    errors = (message for level, _, message in log if level <= av.logging.ERROR)
    return frames, not all(HARMLESS_COMPLAINT.search(message) for message in errors)


def _drain(decoder: VideoCodecContext, packet: av.Packet) -> list[av.VideoFrame]:
    """The frame of a packet that the decoder holds back until it sees the next ones."""
    frames, _ = _decode(decoder, None)
    decoder.flush_buffers()
    if frames and not frames[0].interlaced_frame:
        return frames
    _decode(decoder, packet)  # perhaps one field of two, and the next packet has the other
    return []
