"""Geometry of a video: pixels, latents and tokens of Wan2.2-TI2V."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

TIME_STRIDE = 4  # pixel frames per latent frame, after the first
SPACE_STRIDE = 16  # pixels per latent, in height and in width
PATCH_SIZE = 2  # latents per token, in height and in width
LATENT_CHANNELS = 48
TEXT_LENGTH = 512  # text rows that the denoiser attends to, zero rows included


@dataclass(frozen=True, order=True)
class FrameSize:
    """Height and width of a frame in pixels; ValueError if the VAE or the patches do not divide them."""

    height: int
    width: int

    def __post_init__(self) -> None:
        step = SPACE_STRIDE * PATCH_SIZE
        for name, size in (("height", self.height), ("width", self.width)):
            if size < step or size % step:
                low = max(step, size // step * step)
                raise ValueError(f"{name}={size}: must be a multiple of {step}; nearest are {low} and {low + step}")

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def parse_frame_size(text: str) -> FrameSize:
    """The size that a text such as 704x1280 (height x width) names; ValueError if it names none."""
    match = re.fullmatch(r"\s*([0-9]{1,5})x([0-9]{1,5})\s*", text)
    if match is None:
        raise ValueError("must be HEIGHTxWIDTH, such as 704x1280")
    return FrameSize(int(match[1]), int(match[2]))


def nearest_frame_size(sizes: Sequence[FrameSize], height: int, width: int) -> FrameSize:
    """The size whose aspect ratio is nearest to that of a picture, and of equal ratios the nearest in area."""

    def distance(size: FrameSize) -> tuple[float, float, FrameSize]:
        ratio = size.height * width / (size.width * height)
        # Logarithms: twice as wide is as far away as twice as high. Rounded, so that equal ratios are equal.
        return round(abs(math.log(ratio)), 9), abs(math.log(size.height * size.width / (height * width))), size

    return min(sizes, key=distance)


@dataclass(frozen=True)
class VideoSpec:
    """Size of a video in pixels: `num_frames` of `height` x `width` at `fps` frames per second.

    Raises ValueError for a size that the VAE (4 frames, 16 pixels) or the patches (2 latents) do not divide.
    """

    num_frames: int = 121
    height: int = 704
    width: int = 1280
    fps: int = 24

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % TIME_STRIDE != 1:
            low = max(1, (self.num_frames - 1) // TIME_STRIDE * TIME_STRIDE + 1)
            raise ValueError(
                f"num_frames={self.num_frames}: the VAE needs 4k+1 frames; nearest are {low} and {low + TIME_STRIDE}"
            )
        _ = self.frame_size
        if self.fps < 1:
            raise ValueError(f"fps={self.fps}: must be at least 1")

    @property
    def frame_size(self) -> FrameSize:
        """Height and width."""
        return FrameSize(self.height, self.width)

    @property
    def latent_frames(self) -> int:
        """Number of latent frames T."""
        return (self.num_frames - 1) // TIME_STRIDE + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (C T H W) of one video's latents."""
        return LATENT_CHANNELS, self.latent_frames, self.height // SPACE_STRIDE, self.width // SPACE_STRIDE

    @property
    def first_frame_shape(self) -> tuple[int, int, int, int]:
        """Shape (C 1 H W) of one first frame's latent."""
        channels, _, height, width = self.latent_shape
        return channels, 1, height, width

    @property
    def num_tokens(self) -> int:
        """Number of tokens of one video in the denoiser."""
        _, frames, height, width = self.latent_shape
        return frames * tokens_per_frame(height, width)


def tokens_per_frame(latent_height: int, latent_width: int) -> int:
    """Number of tokens in one latent frame."""
    return (latent_height // PATCH_SIZE) * (latent_width // PATCH_SIZE)
