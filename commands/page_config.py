"""Options of `ui`, and what a visitor of its page asks for."""

from dataclasses import dataclass
from pathlib import Path

from common.options import check_fields, option, option_of
from stage1_encode.config import EncodeConfig
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.sampling.config import SampleConfig

MODEL_OPTIONS = (  # of `sample`, which `ui` passes on as they are
    *("checkpoint", "model", "timesteps", "weights", "base_lora", "max_text_tokens", "dtype", "vae_dtype"),
    *("precision", "decoder", "compile", "vram", "device"),
)


@dataclass(frozen=True)
class VideoRequest:
    """What the form of the page holds."""

    prompt: str
    image: str | None = None  # path of the picture; None = from the prompt alone
    seed: int = 0
    num_frames: int | None = None  # None = as in training
    height: int | None = None
    width: int | None = None
    segments: int = 1
    with_teacher: bool = False


@dataclass(frozen=True)
class TeacherConfig(SampleConfig):
    """What a teacher's video was made with, written beside it."""

    teacher_steps: int = option_of(EvaluateConfig, "teacher_steps")
    guidance_scale: float | None = option_of(EvaluateConfig, "guidance_scale")
    negative_prompt: str = option_of(EncodeConfig, "negative_prompt")


@dataclass(frozen=True)
class PageConfig:
    """Options of `ui`."""

    checkpoint: str = option_of(SampleConfig, "checkpoint")
    model: str = option_of(SampleConfig, "model")
    out: str = option("ui-videos", "Folder for the videos, which stay there.", path="output", group="output")
    host: str = option(
        "127.0.0.1", "Address to listen on; the default is reached from this machine alone.", group="page"
    )
    port: int = option(7860, "Port to listen on.", minimum=1, maximum=65535, group="page")
    teacher_steps: int = option_of(EvaluateConfig, "teacher_steps")
    guidance_scale: float | None = option_of(EvaluateConfig, "guidance_scale")
    negative_prompt: str = option_of(EncodeConfig, "negative_prompt")
    timesteps: tuple[float, ...] | None = option_of(SampleConfig, "timesteps")
    weights: str = option_of(SampleConfig, "weights")
    base_lora: tuple[str, ...] | None = option_of(SampleConfig, "base_lora")
    max_text_tokens: int = option_of(SampleConfig, "max_text_tokens")
    dtype: str = option_of(SampleConfig, "dtype")
    precision: str = option_of(SampleConfig, "precision")
    vae_dtype: str = option_of(SampleConfig, "vae_dtype")
    decoder: str = option_of(SampleConfig, "decoder")
    compile: bool = option_of(SampleConfig, "compile")
    vram: str = option_of(SampleConfig, "vram")
    device: str = option_of(SampleConfig, "device")

    def __post_init__(self) -> None:
        check_fields(self)
        self.sample_config(VideoRequest("any"), Path("any.mp4"))  # checks the timesteps and the precision

    def sample_config(self, request: VideoRequest, out: Path) -> SampleConfig:
        """The options with which `sample` makes the same video; ValueError if the request is not valid."""
        options = {name: vars(self)[name] for name in MODEL_OPTIONS}
        return SampleConfig(
            **options, out=str(out), prompt=request.prompt, image=request.image, seed=request.seed,
            num_frames=request.num_frames, height=request.height, width=request.width, segments=request.segments,
        )  # fmt: skip
