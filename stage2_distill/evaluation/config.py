"""Options of evaluation."""

from dataclasses import dataclass

from common.options import (
    check_fields,
    decoder_option,
    device_option,
    json_option,
    max_text_tokens_option,
    option,
)
from common.video import FrameSize, parse_frame_size
from stage2_distill.config import EXACT, PRECISIONS, check_precision
from stage2_distill.sampling.config import DTYPES, WEIGHT_SETS


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `evaluate`."""

    checkpoint: tuple[str, ...] = option(
        help="Folder of a run or of one checkpoint; repeat the option to compare several.", path="input", group="model"
    )
    shards: str = option(help="Data set of encode; its records are the conditions.", path="any", group="data")
    model: str = option(
        help="Model folder or hub name: the teacher, and the VAE for the videos.", path="any", group="model"
    )
    out: str = option(
        help="Folder for latents, videos, report.json and report.html; the same command resumes.",
        path="output",
        group="output",
    )
    num_records: int = option(
        2048, "Number of records compared, from the first; at most all.", minimum=2, group="data", old_name="count"
    )
    size: str | None = option(
        None, "Size of the records that are compared, HEIGHTxWIDTH; by default every size, each apart.", group="data",
        advanced=True,
    )  # fmt: skip
    num_frames: int | None = option(
        None, "Frames of the videos, one of the lengths of training; default: the longest.", group="data", advanced=True
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the noise.", group="data", advanced=True)
    teacher_steps: int = option(50, "Steps of the teacher.", minimum=1, group="recipe", advanced=True)
    guidance_scale: float | None = option(
        None, "Guidance scale of the teacher; default: that of the distillation.", group="recipe", advanced=True
    )
    weights: str = option("ema", "Weights of the checkpoints.", choices=WEIGHT_SETS, group="model", advanced=True)
    select: bool = option(
        False,
        "First rank every checkpoint of the run on other records and write the name of the best to RUN/best.",
        group="metrics",
    )
    controls: bool = option(False, "Also sample the teacher without guidance.", group="metrics", advanced=True)
    true_clips: str | None = option(
        None,
        "Folder where the paths of the shards' CSV start, or that CSV, which is not read: also measure the whole "
        "clips, through the VAE.",
        path="input",
        group="metrics",
        advanced=True,
    )
    videos: int = option(
        256, "Videos per set that are decoded and measured; 0 = latents only.", minimum=0, group="metrics"
    )
    report_videos: int = option(
        4, "Number of conditions with videos in the report.", minimum=0, group="output", old_name="shown"
    )
    judge: str | None = option(
        None,
        "Python file with judge(video, prompt) -> {question: bool}.",
        path="input",
        group="metrics",
        old_name="analyser",
    )
    i3d_model: str | None = option(
        None,
        "TorchScript file of I3D, for the Frechet video distance.",
        path="input",
        group="metrics",
        advanced=True,
        old_name="i3d",
    )
    clip_model: str | None = option(
        None,
        "CLIP model folder (transformers), for the CLIP score.",
        path="input",
        group="metrics",
        advanced=True,
        old_name="clip",
    )
    decoder: str = decoder_option()
    batch_size: int = option(1, "Videos sampled, and decoded, at once.", minimum=1, group="memory")
    max_text_tokens: int = max_text_tokens_option(advanced=True, old_name="text_rows")
    dtype: str = option("bfloat16", "Precision of the networks.", choices=DTYPES, group="model", advanced=True)
    precision: str = option(
        EXACT, "Products of the given students' blocks, as for sample.", choices=PRECISIONS, group="model",
        advanced=True,
    )  # fmt: skip
    device: str = device_option(advanced=True)
    json: bool = json_option()

    def __post_init__(self) -> None:
        check_fields(self)
        check_precision(self.precision, self.dtype)
        _ = self.frame_size
        if not self.checkpoint:
            raise ValueError("checkpoint: name at least one run")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={','.join(map(str, self.seeds))}: must be distinct numbers")

    @property
    def frame_size(self) -> FrameSize | None:
        """The size of the records that are compared; None = every size. ValueError for a text that is no size."""
        try:
            return None if self.size is None else parse_frame_size(self.size)
        except ValueError as error:
            raise ValueError(f"size={self.size}: {error}") from error
