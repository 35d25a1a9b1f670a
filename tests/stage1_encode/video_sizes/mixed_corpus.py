"""Files of many shapes, as phones, cameras, discs and the web give them; all show the four quarters of `corpus`."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy
from PIL import Image

from tests.stage1_encode.corpus import picture, video

WIDE, TALL, SQUARE = (64, 96), (96, 64), (64, 64)
SIZES = "64x96,96x64,64x64"


@dataclass(frozen=True)
class Shape:
    """A kind of file, the size nearest to it, and how many there are."""

    name: str
    suffix: str
    make: Callable[[Path], object]
    displayed: tuple[int, int]  # (height, width)
    size: tuple[int, int]
    count: int
    is_tiny: bool = False


def clip(height: int, width: int, **options: object) -> Callable[[Path], object]:
    """A maker of a clip of two stored frames."""
    return video("mpeg4", image=picture(height, width), frames=2, **options)


def phone_clip(height: int, width: int, rotation: int, **options: object) -> Callable[[Path], object]:
    """A maker of a clip that is stored turned, and displayed upright."""
    stored = numpy.rot90(picture(height, width), -rotation // 90).copy()
    return video("mpeg4", image=stored, frames=2, rotation=rotation, **options)


def photo(height: int, width: int) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(picture(height, width)).save(path)


def turned_photo(height: int, width: int) -> Callable[[Path], object]:
    """A maker of a picture that EXIF turns by 90 degrees clockwise."""

    def make(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(numpy.rot90(picture(height, width)).copy()).save(path, quality=95, exif=exif)

    return make


PAL = Fraction(64, 45)  # 720 x 576 shown as 1024 x 576
SHAPES = [
    Shape("landscape", ".mp4", clip(90, 160), (90, 160), WIDE, 12),
    Shape("portrait", ".mp4", clip(160, 90), (160, 90), TALL, 12),
    Shape("square", ".mkv", clip(80, 80), (80, 80), SQUARE, 8),
    Shape("phone", ".mp4", phone_clip(160, 90, 90), (160, 90), TALL, 6),
    Shape("phone-left", ".mov", phone_clip(160, 90, -90), (160, 90), TALL, 4),
    Shape("phone-over", ".mp4", phone_clip(90, 160, 180), (90, 160), WIDE, 2),
    Shape("disc", ".mp4", clip(72, 90, aspect=PAL), (72, 128), WIDE, 6),
    Shape("turned-disc", ".mp4", phone_clip(90, 72, 90, aspect=2), (180, 72), TALL, 2),
    Shape("cinema", ".mp4", clip(60, 140), (60, 140), WIDE, 6),
    Shape("story", ".mp4", clip(140, 60), (140, 60), TALL, 2),
    Shape("tiny", ".mp4", clip(24, 36), (24, 36), WIDE, 4, is_tiny=True),
    Shape("photo", ".jpg", photo(75, 100), (75, 100), WIDE, 4),
    Shape("tall-photo", ".png", photo(100, 75), (100, 75), TALL, 3),
    Shape("square-photo", ".webp", photo(100, 100), (100, 100), SQUARE, 3),
    Shape("turned-photo", ".jpg", turned_photo(120, 80), (120, 80), TALL, 4),
]


def make_corpus(folder: Path) -> list[tuple[str, Shape]]:
    """Write all files; returns (name, shape) of each, in an order that mixes the shapes."""
    folder.mkdir(parents=True)
    files = []
    for shape in SHAPES:
        for number in range(shape.count):
            name = f"{shape.name}-{number}{shape.suffix}"
            if number:  # copies, as making them takes longer
                (folder / name).write_bytes((folder / files[-1][0]).read_bytes())
            else:
                shape.make(folder / name)
            files.append((name, shape))
    return sorted(files, key=lambda file: (file[0].rpartition("-")[2], file[0]))
