"""Files as they come: good ones of many kinds, odd ones and broken ones, made on the spot.

All good ones show four coloured quarters, so that turning, cropping and colours can be checked.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy
from PIL import Image

HEIGHT, WIDTH = 96, 144
QUARTERS = {  # (y, x) as a share of the frame -> colour
    (0.25, 0.25): (210, 40, 40),
    (0.25, 0.75): (40, 190, 40),
    (0.75, 0.25): (40, 40, 210),
    (0.75, 0.75): (220, 220, 60),
}
QUIET = {"libx264": {"threads": "1"}, "libx265": {"x265-params": "log-level=none"}}
READABLE = ""  # as a reason: none


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    make: Callable[[Path], object]
    reason: str  # part of why it fails; READABLE = it does not
    within: int = 14  # how far a colour may be off
    grey: bool = False


def picture(height: int = HEIGHT, width: int = WIDTH) -> numpy.ndarray:
    image = numpy.empty((height, width, 3), numpy.uint8)
    for (y, x), colour in QUARTERS.items():
        rows = slice(0, height // 2) if y < 0.5 else slice(height // 2, height)
        columns = slice(0, width // 2) if x < 0.5 else slice(width // 2, width)
        image[rows, columns] = colour
    return image


def luminance(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def video(
    codec: str = "libx264",
    layout: str = "yuv420p",
    *,
    image: numpy.ndarray | None = None,
    frames: int = 4,
    rotation: int = 0,
    aspect: int | Fraction = 1,
    steps: tuple[int, ...] = (),
) -> Callable[[Path], object]:
    """A maker of a video; `steps` are the times of its frames in 1/24 s."""

    def make(path: Path) -> None:
        shown = picture() if image is None else image
        with av.open(str(path), "w") as file:
            stream = file.add_stream(codec, rate=24, options=QUIET.get(codec, {}))
            stream.height, stream.width, stream.pix_fmt = *shown.shape[:2], layout
            if aspect > 1:
                stream.codec_context.sample_aspect_ratio = Fraction(aspect, 1)
            if rotation:
                stream.set_display_rotation(rotation)
            file.start_encoding()
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format=layout)
                frame.pts, frame.time_base = (steps[index] if steps else index), Fraction(1, 24)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())

    return make


def damaged(change: Callable[[bytes], bytes], *, faststart: bool = False) -> Callable[[Path], object]:
    """A maker of a video whose bytes are changed."""

    def make(path: Path) -> None:
        noise = numpy.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(numpy.uint8)
        video(image=noise)(path)
        if faststart:
            moved = path.with_name("moved.mp4")
            with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "+faststart"}) as target:
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            moved.replace(path)
        path.write_bytes(change(path.read_bytes()))

    return make


def renamed(make: Callable[[Path], object], path: Path, suffix: str) -> None:
    make(path.with_suffix(suffix))
    path.with_suffix(suffix).rename(path)


def foreign_words(path: Path) -> None:
    """A video whose metadata are not UTF-8."""
    video()(path)
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xff\xfe\xe9f"))


def heic(path: Path) -> None:
    """A video that calls itself a HEIC picture."""
    renamed(video(), path, ".mp4")
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"heic" + data[12:])


def audio(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(numpy.zeros((1, 16000), numpy.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        file.mux(stream.encode(samples))
        file.mux(stream.encode())


def saved(mode: str, **options: object) -> Callable[[Path], object]:
    """A maker of a picture in one of Pillow's modes."""
    return lambda path: Image.fromarray(picture()).convert(mode).save(path, **options)


def sixteen_bit(path: Path) -> None:
    grey = numpy.asarray(Image.fromarray(picture()).convert("L")).astype(numpy.uint16) * 257
    Image.fromarray(grey).save(path)


def transparent(path: Path) -> None:
    image = Image.fromarray(picture()).convert("RGBA")
    image.putalpha(255)
    image.save(path)


def lying_on_its_side(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(numpy.rot90(picture()).copy()).save(path, quality=95, subsampling=0, exif=exif)


def truncated_picture(path: Path) -> None:
    saved("RGB")(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def huge_png(path: Path) -> None:
    saved("RGB")(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


VIDEOS = [
    Kind("plain.mp4", video(), READABLE),
    Kind("one-frame.mp4", video(frames=1), READABLE),
    Kind("variable-rate.mp4", video(steps=(0, 1, 9, 40)), READABLE),
    Kind("foreign-words.mp4", foreign_words, READABLE),
    Kind("late-start.mp4", video(steps=(50, 51, 52, 53)), READABLE),
    Kind("odd-size.webm", video("libvpx-vp9", image=picture(95, 143)), READABLE),
    Kind("rotated-90.mp4", video(image=numpy.rot90(picture(), -1).copy(), rotation=90), READABLE),
    Kind("rotated-180.mp4", video(image=numpy.rot90(picture(), 2).copy(), rotation=180), READABLE),
    Kind("anamorphic.mp4", video(image=picture(HEIGHT, WIDTH // 2), aspect=2), READABLE),
    Kind("ten-bit-hevc.mp4", video("libx265", "yuv420p10le"), READABLE),
    Kind("hevc.mp4", video("libx265"), READABLE),
    Kind("vp8.webm", video("libvpx"), READABLE),
    Kind("vp9.webm", video("libvpx-vp9"), READABLE),
    Kind("av1.mp4", video("libsvtav1"), READABLE),
    Kind("mpeg4.avi", video("mpeg4"), READABLE, within=24),
    Kind("mpeg2.mpg", video("mpeg2video"), READABLE, within=24),
    Kind("transport.ts", video(), READABLE),
    Kind("prores.mov", video("prores_ks", "yuv422p10le"), READABLE),
    Kind("alpha.mov", video("prores_ks", "yuva444p10le"), READABLE),
    Kind("animation.gif", video("gif", "rgb8"), READABLE, within=50),
    Kind("grey.mkv", video("ffv1", "gray"), READABLE, grey=True),
    Kind("four-four-four.mp4", video(layout="yuv444p"), READABLE),
    Kind("wrong-name.jpg", lambda path: renamed(video(), path, ".mp4"), READABLE),
]
PICTURES = [
    Kind("picture.png", saved("RGB"), READABLE),
    Kind("picture.webp", saved("RGB", lossless=True), READABLE),
    Kind("picture.avif", saved("RGB"), READABLE),
    Kind("palette.png", saved("P"), READABLE, within=40),
    Kind("grey.jpg", saved("L"), READABLE, grey=True),
    Kind("cmyk.jpg", saved("CMYK", quality=95), READABLE, within=30),
    Kind("sixteen-bit.png", sixteen_bit, READABLE, grey=True),
    Kind("alpha.png", transparent, READABLE),
    Kind("on-its-side.jpg", lying_on_its_side, READABLE),
    Kind("really-a-picture.mp4", lambda path: renamed(saved("RGB"), path, ".png"), READABLE),
]
BROKEN = [
    Kind("zero-bytes.mp4", Path.touch, "is empty"),
    Kind("random-bytes.mp4", lambda path: path.write_bytes(random.Random(0).randbytes(20_000)), "no readable video"),
    Kind("text.mp4", lambda path: path.write_text("no video\n" * 500), "no readable video"),
    Kind("folder.mp4", Path.mkdir, "is a folder"),
    Kind("missing.mp4", lambda path: None, "does not exist"),
    Kind("audio-only.mp4", audio, "no video stream"),
    Kind("no-frames.mp4", video(frames=0), " "),
    Kind("cut-without-index.mp4", damaged(lambda data: data[: len(data) // 2]), "no readable video"),
    Kind("cut-in-first-frame.mp4", damaged(lambda data: data[:6000], faststart=True), "first frame"),
    Kind("cut-in-index.mp4", damaged(lambda data: data[:300], faststart=True), "no video stream"),
    Kind("cut-to-header.mp4", damaged(lambda data: data[:32]), "no readable video"),
    Kind("zeroed.mp4", damaged(lambda data: data[:2000] + bytes(len(data) - 2000), faststart=True), "first frame"),
    Kind("cut-picture.jpg", truncated_picture, "broken picture"),
    Kind("cut-picture.png", truncated_picture, "broken picture"),
    Kind("huge-picture.png", huge_png, "pixels"),
    Kind(
        "huge-video.y4m",
        lambda path: path.write_bytes(b"YUV4MPEG2 W60000 H60000 F25:1 C420\nFRAME\n" + bytes(9999)),
        " ",
    ),
    Kind("photo.heic", heic, "is a HEIC picture; save it as JPEG"),
    Kind("shell.png", lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"), "no readable video"),
]
