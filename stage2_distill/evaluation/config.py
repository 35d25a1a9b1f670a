"""Options of evaluation."""

from dataclasses import dataclass

from common.options import check_fields, device_option, max_text_tokens_option, option
from stage2_distill.sampling.config import DTYPES, WEIGHT_SETS


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` compares, and how."""

    checkpoint: tuple[str, ...] = option(help="Folder of a run or of one checkpoint; several times adds others.")
    shards: str = option(help="Data set made by encode: the conditions.")
    model: str = option(help="Model folder or hub name: the teacher, and the VAE for the videos.")
    out: str = option(help="Folder for latents, videos, report.json and report.html; the same command goes on.")
    count: int = option(2048, "Records compared, from the first; all where there are fewer.", minimum=2)
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the noise.")
    teacher_steps: int = option(50, "Steps of the teacher.", minimum=1)
    guidance_scale: float | None = option(None, "Of the teacher; without it, what the checkpoint was distilled at.")
    weights: str = option("ema", "Weights of the checkpoints.", choices=WEIGHT_SETS)
    select: bool = option(False, "First score every checkpoint of the run and write the name of the best to RUN/best.")
    videos: int = option(256, "Videos a set that are decoded and looked at; 0 = latents only.", minimum=0)
    shown: int = option(4, "Conditions whose videos are in the report.", minimum=0)
    analyser: str | None = option(None, "Python file with judge(video, prompt) -> {question: True or False}.")
    i3d: str | None = option(None, "TorchScript file of an I3D network, for the Frechet video distance.")
    clip: str | None = option(None, "Folder of a CLIP model in the layout of transformers, for the CLIP score.")
    batch_size: int = option(1, "Videos sampled, and decoded, at once.", minimum=1)
    text_rows: int = max_text_tokens_option()
    dtype: str = option("bfloat16", "Precision of the networks.", choices=DTYPES)
    device: str = device_option()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.checkpoint:
            raise ValueError("checkpoint: name at least one run")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={','.join(map(str, self.seeds))}: needs numbers that differ")
