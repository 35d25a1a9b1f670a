"""H.264 coded in fields (PAFF), which x264 cannot write: camcorders and 1080i broadcasts do. Every block is I_PCM."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy


class BitWriter:
    """Bits of a NAL unit's payload."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def fixed(self, value: int, count: int) -> "BitWriter":
        self.bits += [value >> i & 1 for i in range(count - 1, -1, -1)]
        return self

    def golomb(self, *values: int) -> "BitWriter":
        for value in values:
            length = (value + 1).bit_length()
            self.fixed(0, length - 1).fixed(value + 1, length)
        return self

    def align(self) -> "BitWriter":
        self.bits += [0] * (-len(self.bits) % 8)
        return self

    def unit(self, header: int) -> bytes:
        """The NAL unit in Annex B form, with its emulation prevention."""
        self.bits.append(1)
        out, zeros = bytearray(), 0
        for byte in numpy.packbits(numpy.array(self.align().bits, numpy.uint8)).tobytes():
            if zeros >= 2 and byte <= 3:
                out.append(3)
                zeros = 0
            out.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([header]) + bytes(out)


def field_slice(planes: Sequence[numpy.ndarray], index: int, *, bottom: bool, is_key: bool) -> bytes:
    """One field, of planes Y (Y X), U and V (Y/2 X/2) uint8: the first of a GOP is a key picture, others P pictures."""
    bits = BitWriter().golomb(0, 7 if is_key else 5, 0).fixed(index % 16, 4).fixed(2 | bottom, 2)
    if is_key:
        bits.golomb(0)
    bits.fixed((2 * index + bottom) & 255, 8).fixed(0, 2 if is_key else 3).golomb(0, 1)
    for y in range(planes[0].shape[0] // 16):
        for x in range(planes[0].shape[1] // 16):
            bits.golomb(25) if is_key else bits.golomb(0, 30)
            bits.align()
            for plane, size in zip(planes, (16, 8, 8), strict=True):
                block = plane[y * size : (y + 1) * size, x * size : (x + 1) * size]
                bits.bits += numpy.unpackbits(numpy.ascontiguousarray(block)).tolist()
    return b"\0\0\0\1\x09\x10" * bottom + bits.unit(0x65 if is_key else 0x61)


def field_stream(images: Sequence[numpy.ndarray], gop: int) -> bytes:
    """Grey images (Y X) uint8, of multiples of 32 and 16, in Annex B form, with a key picture every `gop` images."""
    height, width = images[0].shape
    sequence = BitWriter().fixed(77 << 16 | 30, 24).golomb(0, 0, 0, 4, 1).fixed(0, 1)
    sequence.golomb(width // 16 - 1, height // 32 - 1).fixed(0b0010, 4).fixed(0, 1)
    picture = BitWriter().golomb(0, 0).fixed(0, 2).golomb(0, 0, 0).fixed(0, 3).golomb(0, 0, 0).fixed(0b100, 3)
    head, stream = sequence.unit(0x67) + picture.unit(0x68), b""
    for number, image in enumerate(images):
        index = number % gop
        stream += b"\0\0\0\1\x09\x10" + head * (index == 0)
        for bottom in (False, True):
            chroma = numpy.full((height // 4, width // 2), 128, numpy.uint8)
            luma = image[int(bottom) :: 2].clip(1, 254)
            stream += field_slice((luma, chroma, chroma), index, bottom=bottom, is_key=index == 0 and not bottom)
    return stream


def write_transport_stream(path: Path, stream: bytes) -> str:
    """An H.264 stream of single fields in an MPEG transport stream, 24 frames a second."""
    with av.open(io.BytesIO(stream), format="h264") as source, av.open(str(path), "w", format="mpegts") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, 48), copy
                target.mux(packet)
    return str(path)
