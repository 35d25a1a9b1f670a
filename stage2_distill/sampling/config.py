"""Options of sampling."""

from dataclasses import dataclass, replace

from common.flow import timestep_sigmas
from common.options import check_fields, device_option, max_text_tokens_option, option
from common.video import VideoSpec

DTYPES = ("float32", "bfloat16")
WEIGHT_SETS = ("ema", "student")
VAE_DTYPES = ("auto", "float32", "bfloat16")
VRAM_CHOICES = ("auto", "full", "16gb")


@dataclass(frozen=True)
class SampleConfig:
    """What `sample` makes of a checkpoint."""

    checkpoint: str = option(
        help="Folder of a run (its best checkpoint is used, else its newest) or of one checkpoint.", group="model"
    )
    model: str = option(help="Model folder or hub name.", group="model")
    out: str = option(help="An .mp4 file for --prompt, a folder for --data.", group="output")
    prompt: str | None = option(None, "Text of one video.", group="data")
    image: str | None = option(None, "First frame of one video; without it the prompt alone decides.", group="data")
    data: str | None = option(None, "CSV of many videos, columns prompt, image, seed.", group="data")
    seed: int = option(0, "Seed of the noise; a seed in the CSV wins.", minimum=0, group="data")
    timesteps: tuple[float, ...] | None = option(
        None,
        "Sample with other steps than the checkpoint was trained on.",
        group="recipe",
        advanced=True,
        old_name="ladder",
    )
    weights: str = option("ema", "Weights to sample from.", choices=WEIGHT_SETS, group="model", advanced=True)
    batch_size: int = option(1, "Videos sampled at once.", minimum=1, group="memory", advanced=True)
    max_text_tokens: int = max_text_tokens_option(advanced=True, old_name="text_rows")
    dtype: str = option("bfloat16", "Precision of the network.", choices=DTYPES, group="model", advanced=True)
    vae_dtype: str = option(
        "auto",
        "Precision of the VAE; auto: bfloat16 on a GPU, else float32.",
        choices=VAE_DTYPES,
        group="model",
        advanced=True,
    )
    compile: bool = option(
        False,
        "Compile network and decoder first (under a minute, cached): for many videos.",
        group="speed",
        advanced=True,
    )
    segments: int = option(
        1,
        "Videos in a row: each goes on from the last frame of the one before.",
        minimum=1,
        group="size",
        advanced=True,
    )
    num_frames: int | None = option(None, "Frames of a segment, 4k+1; without it, as in training.", group="size")
    height: int | None = option(None, "Height in pixels, a multiple of 32; without it, as in training.", group="size")
    width: int | None = option(None, "Width in pixels, a multiple of 32; without it, as in training.", group="size")
    vram: str = option(
        "auto",
        "What may stay on the GPU: full needs 40 GB; auto looks at the card.",
        choices=VRAM_CHOICES,
        group="memory",
        old_name="memory",
        old_values={"24gb": "16gb"},  # a slower and larger mode of the last release
    )
    device: str = device_option(advanced=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.prompt is None) == (self.data is None):
            raise ValueError("give either --prompt TEXT or --data CSV")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty: say what the video shows")
        if self.prompt is not None and not self.out.endswith(".mp4"):
            raise ValueError(f"out={self.out}: must end in .mp4 for a single video")
        if self.data is not None and self.out.endswith(".mp4"):
            raise ValueError(f"out={self.out}: must be a folder for --data; one .mp4 file is for --prompt")
        if self.data is not None and self.image is not None:
            raise ValueError("--image goes with --prompt; a CSV names its images in the column image")
        self.video_spec(VideoSpec())  # sizes that no model can make

    def video_spec(self, spec: VideoSpec) -> VideoSpec:
        """The size to make: the checkpoint's, but for what is given."""
        requested = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        return replace(spec, **{name: value for name, value in requested.items() if value is not None})

    def explicit_sigmas(self, shift: float) -> tuple[float, ...] | None:
        """Noise levels of an explicit ladder; None = the checkpoint's own."""
        return None if self.timesteps is None else timestep_sigmas(self.timesteps, s=shift)
