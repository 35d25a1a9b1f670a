"""First displayed frames: complete and of the right track, or refused; what a reader does not know does no harm."""

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from stage1_encode.media.first_frame import read_first_frame
from stage1_encode.media.video_frame import UnreadableError, _is_filled
from tests import tiny_models
from tests.stage1_encode.media import field_coded

HEIGHT, WIDTH, FRAMES = 64, 96, 14
HINTS = {  # codec -> pixel format, options
    "libx264": ("yuv420p", {"threads": "1", "crf": "10"}),
    "libx265": ("yuv420p", {"x265-params": "log-level=none:crf=10:keyint=6"}),
    "libvpx-vp9": ("yuv420p", {"crf": "10", "b": "0"}),
    "libvpx": ("yuv420p", {"b": "4M"}),
    "libsvtav1": ("yuv420p", {"crf": "10"}),
    "mpeg4": ("yuv420p", {"qmin": "2", "qmax": "2"}),
    "mpeg2video": ("yuv420p", {"g": "6", "bf": "2", "qmin": "2", "qmax": "2"}),
    "prores_ks": ("yuv422p10le", {}),
    "mjpeg": ("yuvj420p", {"qmin": "2", "qmax": "2"}),
    "ffv1": ("yuv420p", {}),
}
# Decoders of the first kind tell of flipped bits; those of the second follow them without a word, as all bits mean
# something to them, but holes and cuts are seen.
TELLING = [
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "ts"),
    ("libx264", "avi"),
    ("mpeg4", "avi"),
    ("mpeg4", "mp4"),
    ("mpeg2video", "mpg"),
    ("mpeg2video", "ts"),
    ("prores_ks", "mov"),
    ("mjpeg", "avi"),
    ("ffv1", "mkv"),
]
SILENT = [
    ("libx265", "mp4"),
    ("libx265", "mkv"),
    ("libx265", "ts"),
    ("libvpx-vp9", "webm"),
    ("libvpx", "webm"),
    ("libsvtav1", "mp4"),
]


def noisy(number: int) -> numpy.ndarray:
    """A picture (H W 3) uint8 with so much detail that its packet is large."""
    noise = numpy.random.default_rng(number).integers(
        -60, 61, (HEIGHT, WIDTH, 1)
    )  # grey, since chroma is stored at half size
    return (tiny_models.picture(HEIGHT, WIDTH, seed=number) + noise).clip(0, 255).astype(numpy.uint8)


def write_clip(path: Path, codec: str, *, options: dict[str, str] | None = None, frames: int = FRAMES) -> Path:
    layout, hints = HINTS[codec]
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}) as file:
        stream = file.add_stream(codec, rate=24, options=hints | (options or {}))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, layout
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(noisy(number), format="rgb24").reformat(format=layout)
            frame.pts, frame.time_base = number, Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def read(path: Path | str) -> numpy.ndarray:
    return read_first_frame(str(path), height=HEIGHT, width=WIDTH).pixels


def frame_number(pixels: numpy.ndarray) -> int:
    """Which of the noisy pictures this is."""
    return int(numpy.argmin([abs(pixels.astype(int) - noisy(number)).mean() for number in range(FRAMES)]))


def first_packet(path: Path) -> tuple[int, int]:
    """The position and the size of the first packet in a file."""
    with av.open(str(path)) as file:
        packet = next(file.demux(video=0))
        return packet.pos, packet.size


def flip_bits(data: bytearray, start: int, size: int) -> None:
    chance = random.Random(0)
    for _ in range(20):
        data[start + size // 4 + chance.randrange(size * 3 // 4)] ^= 1 << chance.randrange(8)


def punch_hole(data: bytearray, start: int, size: int) -> None:
    data[start + size // 3 : start + size * 2 // 3] = bytes(size * 2 // 3 - size // 3)


def cut_off(data: bytearray, start: int, size: int) -> None:
    del data[start + size // 2 :]


@pytest.mark.parametrize(("codec", "suffix"), TELLING + SILENT)
def test_an_undamaged_file_shows_its_first_frame(codec: str, suffix: str, tmp_path: Path) -> None:
    assert frame_number(read(write_clip(tmp_path / f"a.{suffix}", codec))) == 0


@pytest.mark.parametrize("padding", [0, 5 << 20])
@pytest.mark.parametrize(
    ("codec", "suffix", "damage"),
    [(*kind, damage) for kind in TELLING for damage in (flip_bits, punch_hole, cut_off)]
    + [(*kind, damage) for kind in SILENT for damage in (punch_hole, cut_off) if kind[1] != "ts" or damage != cut_off],
)
def test_damage_in_the_first_frame_is_refused(
    codec: str, suffix: str, damage: Callable[[bytearray, int, int], None], padding: int, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / f"a.{suffix}", codec)
    data = bytearray(path.read_bytes())
    damage(data, *first_packet(path))
    if padding and suffix in ("mp4", "mov"):  # an atom that means nothing
        data += (padding + 8).to_bytes(4, "big") + b"free" + bytes(padding)
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="first frame|no complete frame|no key frame"):
        read(path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"\0\0\0\1\x06\x05\xff\xff\x10" + b"a" * 20 + b"\x80", b""),  # metadata that are cut off
        (b"\0\0\0\1\x18abcdefgh", b""),  # a unit of an unknown kind
        (b"", b"\0\0\0\1\x0c" + b"\xff" * 3000 + b"\x80"),  # filler
        (b"", bytes(1000)),  # padding
    ],
)
def test_oddities_beside_a_sound_frame_do_not_matter(before: bytes, after: bytes, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", "libx264", options={"bf": "0"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "odd.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in (packet for packet in source.demux(video=0) if packet.size):
            odd = av.Packet(before + bytes(packet) + after)
            odd.pts, odd.dts, odd.time_base, odd.stream = packet.pts, packet.dts, packet.time_base, stream
            target.mux(odd)
    assert frame_number(read(tmp_path / "odd.ts")) == 0


@pytest.mark.parametrize("layout", ["yuv420p", "yuv422p10le", "yuvj420p"])
def test_a_frame_that_was_not_decoded_to_its_end_is_told_from_a_black_one(layout: str) -> None:
    black = av.VideoFrame.from_ndarray(numpy.zeros((64, 96, 3), numpy.uint8), format="rgb24").reformat(format=layout)
    assert _is_filled(black)
    for plane in black.planes:  # what FFmpeg hands out before anything is decoded into it
        plane.update(bytes(plane.buffer_size // 2) + bytes(plane)[: plane.buffer_size // 2])
    assert _is_filled(black)
    for plane in black.planes:
        plane.update(bytes(plane.buffer_size))
    assert not _is_filled(black)


@pytest.mark.parametrize(("codec", "suffix"), [kind for kind in TELLING if kind[1] in ("mp4", "mkv", "avi", "mov")])
def test_damage_after_the_first_frame_does_not_matter(codec: str, suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"a.{suffix}", codec)
    with av.open(str(path)) as file:
        *_, packet = (packet for packet in file.demux(video=0) if packet.size)
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    flip_bits(data, start, size)
    path.write_bytes(data)
    assert frame_number(read(path)) == 0


def copy_packets(source: Path, target: Path, *, skip: int) -> Path:
    """A stream that is cut out of a longer one: its first packets are missing."""
    with av.open(str(source)) as long, av.open(str(target), "w") as short:
        stream = short.add_stream_from_template(long.streams.video[0])
        for number, packet in enumerate(packet for packet in long.demux(video=0) if packet.size):
            if number >= skip:
                packet.stream = stream
                short.mux(packet)
    return target


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "keyint=6:min-keyint=6:scenecut=0:open-gop=1:bframes=2:b-adapt=0"}),
        ("libx264", {"x264-params": "keyint=6:min-keyint=6:scenecut=0:bframes=0"}),
        ("libx265", {"x265-params": "log-level=none:crf=10:keyint=6:min-keyint=6:scenecut=0:bframes=2:b-adapt=0"}),
        ("mpeg2video", {}),
        ("mpeg4", {"g": "6", "bf": "2", "sc_threshold": "1000000000"}),
    ],
)
def test_of_a_cut_stream_the_first_complete_frame_is_read(
    codec: str, options: dict[str, str], suffix: str, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "long.ts", codec, options=options)
    pixels = read(copy_packets(path, tmp_path / f"cut.{suffix}", skip=2))
    number = frame_number(pixels)
    assert 0 < number <= 8 and abs(pixels.astype(int) - noisy(number)).mean() < 10  # no trace of missing references


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
def test_a_stream_without_a_key_frame_is_refused(codec: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mkv", codec, options={"g": "99", "sc_threshold": "1000000000"}, frames=6)
    with pytest.raises(UnreadableError, match="holds no key frame|no frame"):
        read(copy_packets(path, tmp_path / "cut.mkv", skip=1))


@pytest.mark.parametrize("gop", [12, 99])
def test_both_fields_of_the_first_frame_are_read(gop: int, tmp_path: Path) -> None:
    images = [tiny_models.picture(HEIGHT, WIDTH, seed=number).mean(2).astype(numpy.uint8) for number in range(14)]
    stream = field_coded.field_stream(images, gop)
    pixels = read(field_coded.write_transport_stream(tmp_path / "fields.ts", stream))
    grey = ((images[0].astype(float) - 16) * 255 / 219).clip(0, 255)  # luma in video range
    assert abs(pixels.mean(2) - grey).mean() < 3


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx264", "ts", {"x264-params": "tff=1:bframes=2"}),
        ("libx264", "mp4", {"x264-params": "bff=1:bframes=2"}),
        ("mpeg2video", "ts", {"flags": "+ildct+ilme"}),
        ("mpeg2video", "mpg", {"flags": "+ildct+ilme"}),
    ],
)
def test_an_interlaced_frame_is_complete(codec: str, suffix: str, options: dict[str, str], tmp_path: Path) -> None:
    pixels = read(write_clip(tmp_path / f"a.{suffix}", codec, options=options)).astype(int)
    for field in (0, 1):
        assert abs(pixels[field::2] - noisy(0)[field::2]).mean() < 10


@pytest.mark.parametrize("second", [False, True])
def test_a_track_of_an_unknown_codec(second: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    layout, options = HINTS["libx264"]
    with av.open(str(path), "w") as file:
        for _ in range(1 + second):
            stream = file.add_stream("libx264", rate=24, options=options)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, layout
        for number in range(2):
            for stream in file.streams.video:
                frame = av.VideoFrame.from_ndarray(noisy(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 24)
                file.mux(stream.encode(frame))
        for stream in file.streams.video:
            file.mux(stream.encode())
    before, _, after = path.read_bytes().rpartition(b"avc1")  # the codec of the last track
    path.write_bytes(before + b"zzz1" + after)
    if second:
        assert frame_number(read(path)) == 0
        return
    with pytest.raises(UnreadableError, match="is in the codec zzz1, for which there is no decoder"):
        read(path)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>", "the codec svg"),
        ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "no readable video|jpegxl"),
    ],
)
def test_a_picture_that_nobody_reads_is_named(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableError, match=reason):
        read(tmp_path / name)


def test_frames_with_exif_are_turned(tmp_path: Path) -> None:
    """Cameras write it into MJPEG; PyAV has no name for such side data."""
    upright, exif = tiny_models.picture(HEIGHT, WIDTH, seed=0), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo = Image.fromarray(numpy.rot90(upright).copy())
    photo.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    with av.open(str(tmp_path / "photo.jpg")) as source, av.open(str(tmp_path / "camera.avi"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packet = next(source.demux(video=0))
        packet.stream = stream
        target.mux(packet)
    frame = read_first_frame(str(tmp_path / "camera.avi"), height=HEIGHT, width=WIDTH)
    assert frame.size == (HEIGHT, WIDTH) and abs(frame.pixels.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("other", [(1, 0, 0, 1), (-1, 0, 0, -1), (0, 1, -1, 0)])
@pytest.mark.parametrize("turn", [(x, 0, 0, y) for x in (1, -1) for y in (1, -1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_only_the_matrix_of_the_chosen_track_turns_it(
    swapped: bool, turn: tuple[int, ...], other: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    upright = tiny_models.picture(HEIGHT, WIDTH, seed=0)
    stored = numpy.ascontiguousarray(upright[:: turn[3], :: turn[0]])
    if swapped:
        stored, turn = numpy.ascontiguousarray(stored.transpose(1, 0, 2)), (0, turn[3], turn[0], 0)
    with av.open(str(tmp_path / f"a{suffix}"), "w") as file:
        for matrix in (turn, other):
            stream = file.add_stream("libx264", rate=24, options=HINTS["libx264"][1])
            stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
            xx, xy, yx, yy = (part << 16 for part in matrix)
            stream.set_display_matrix((xx, xy, 0, yx, yy, 0, 0, 0, 1 << 30))
            stream.disposition = av.stream.Disposition.default if matrix is turn else 0
        for stream in file.streams.video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
            file.mux(stream.encode())
    frame = read_first_frame(str(tmp_path / f"a{suffix}"), height=HEIGHT, width=WIDTH)
    assert frame.size == (HEIGHT, WIDTH) and abs(frame.pixels.astype(int) - upright).mean() < 4
