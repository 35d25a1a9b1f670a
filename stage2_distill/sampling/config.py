"""Options of sampling."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.flow import timestep_sigmas
from common.options import (
    base_folder_option,
    check_fields,
    decoder_option,
    device_option,
    max_text_tokens_option,
    option,
)
from common.video import VideoSpec
from stage2_distill.config import EXACT, PRECISIONS, check_precision

LARGEST_SEED = 10**18 - 1  # as in a CSV

DTYPES = ("float32", "bfloat16")  # of the network
WEIGHT_SETS = ("ema", "student")  # prefixes of the tensors of a checkpoint
VAE_DTYPES = ("auto", "float32", "bfloat16")
VRAM_CHOICES = ("auto", "full", "16gb", "12gb")


@dataclass(frozen=True)
class SampleConfig:
    """Options of `sample`."""

    checkpoint: str = option(
        help="Folder of a run (its best checkpoint, else its newest, is used) or of one checkpoint; or a file of "
        "weights or a LoRA file of another program.",
        path="input",
        group="model",
    )
    model: str = option(help="Model folder or hub name.", path="any", group="model")
    out: str = option(help="An .mp4 file for --prompt, a folder for --data.", path="output", group="output")
    prompt: str | None = option(None, "Prompt of a single video.", group="data")
    image: str | None = option(
        None, "First frame of a single video; default: from the prompt alone.", path="any", group="data"
    )
    data: str | None = option(None, "CSV of many videos, columns prompt, image, seed.", path="input", group="data")
    seed: int = option(
        0, "Seed of the noise; a seed in the CSV takes precedence.", minimum=0, maximum=LARGEST_SEED, group="data"
    )
    timesteps: tuple[float, ...] | None = option(
        None, "Timesteps of the sampler, if not those of training.", group="recipe", advanced=True, old_name="ladder"
    )
    weights: str = option("ema", "Weights to sample from.", choices=WEIGHT_SETS, group="model", advanced=True)
    base_lora: tuple[str, ...] | None = option(
        None, "LoRA file, FILE or FILE:WEIGHT, added to the weights; may be repeated.",
        path="input", group="model", advanced=True,
    )  # fmt: skip
    batch_size: int = option(1, "Videos sampled at once.", minimum=1, group="memory", advanced=True)
    max_text_tokens: int = max_text_tokens_option(advanced=True, old_name="text_rows")
    dtype: str = option(
        "bfloat16", "Precision of the network and its conditions.", choices=DTYPES, group="model", advanced=True
    )
    precision: str = option(
        EXACT, "Products of the blocks: exact, in the dtype, or fp8, in 8 bits: faster, and half of the memory.",
        choices=PRECISIONS, group="speed", advanced=True,
    )  # fmt: skip
    vae_dtype: str = option(
        "auto", "VAE precision; auto: bfloat16 on GPUs, else float32.", choices=VAE_DTYPES, group="model", advanced=True
    )
    decoder: str = decoder_option()
    compile: bool = option(
        False, "Compile first (under a minute, kept for later runs); for many videos.", group="speed", advanced=True
    )
    segments: int = option(
        1, "Consecutive videos; each starts at the last frame before it.", minimum=1, group="size", advanced=True
    )
    num_frames: int | None = option(None, "Frames of a segment, 4k+1; default: as in training.", group="size")
    height: int | None = option(
        None, "Height in pixels, a multiple of 32; default: as in training, the size nearest to the picture.",
        group="size",
    )  # fmt: skip
    width: int | None = option(None, "Width in pixels, a multiple of 32; default: as the height's.", group="size")
    vram: str = option(
        "auto",
        "What stays on the GPU: full all models (40 GB), 16gb the one that computes, 12gb three blocks of it.",
        choices=VRAM_CHOICES,
        group="memory",
        old_name="memory",
        old_values={"24gb": "16gb"},  # a slower and larger mode of the last release
        sizes={40: "full", 16: "16gb", 12: "12gb"},
    )
    base_folder: str | None = base_folder_option()
    device: str = device_option(advanced=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_precision(self.precision, self.dtype)
        if (self.prompt is None) == (self.data is None):
            raise ValueError("give either --prompt TEXT or --data CSV")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty: describe the video")
        if self.prompt is not None and Path(self.out).suffix != ".mp4":  # o/.mp4 has none
            raise ValueError(f"out={self.out}: must end in .mp4 for a single video")
        if self.data is not None and self.out.endswith(".mp4"):
            raise ValueError(f"out={self.out}: must be a folder for --data; one .mp4 file is for --prompt")
        if self.data is not None and self.image is not None:
            raise ValueError("--image goes with --prompt; a CSV names its images in the column image")
        self.video_spec(VideoSpec())  # rejects sizes that no model supports before anything is loaded
        if self.timesteps is not None:
            timestep_sigmas(self.timesteps, s=1)  # the shift is in the checkpoint; it does not decide what is valid

    def video_spec(self, spec: VideoSpec) -> VideoSpec:
        """The checkpoint's video size with the options that are set in place of its own."""
        requested = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        return replace(spec, **{name: value for name, value in requested.items() if value is not None})
