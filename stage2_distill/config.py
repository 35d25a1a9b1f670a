"""Options of stage two."""

from dataclasses import dataclass

from common.flow import ladder
from common.options import DEVICES, at_least, one_of, option
from common.video import VideoSpec

DTYPES = ("float32", "bfloat16")
CRITIC_LOSSES = ("x0", "flow", "noise")
WEIGHTS = ("ema", "student")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be between 0 and 1")


@dataclass(frozen=True)
class DistillConfig:
    """What `distill` does; the defaults are the published recipe (quanhaol/Wan2.2-TI2V-5B-Turbo)."""

    shards: tuple[str, ...] = option(help="Data set made by encode; FOLDER:WEIGHT, several times, mixes data sets.")
    model: str = option(help="Model folder in the layout of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a hub name.")
    out: str = option(help="Folder of the run.")
    iterations: int = option(4000, "Iterations in all; each updates the critic once.")
    num_frames: int = option(121, "Frames of a video, 4k+1.")
    height: int = option(704, "Height in pixels, a multiple of 32.")
    width: int = option(1280, "Width in pixels, a multiple of 32.")
    fps: int = option(24, "Frames a second.")
    ladder: tuple[float, ...] = option((1000.0, 750.0, 500.0, 250.0), "The student's steps, before the shift.")
    shift: float = option(5.0, "Shift of the noise levels.")
    guidance_scale: float = option(7.0, "Teacher: uncond + scale * (cond - uncond).")
    student_lr: float = option(5e-7, "Learning rate of the student.")
    critic_lr: float = option(1e-7, "Learning rate of the critic.")
    beta1: float = option(0.0, "AdamW.")
    beta2: float = option(0.999, "AdamW.")
    eps: float = option(1e-8, "AdamW.")
    weight_decay: float = option(0.01, "AdamW, on all parameters.")
    grad_clip: float = option(10.0, "Largest global gradient norm, both roles.")
    student_every: int = option(5, "Iterations from one student update to the next.")
    critic_warmup: int = option(0, "First iterations that leave the student alone.")
    critic_loss: str = option("x0", "Critic regresses x0, flow (velocity) or noise.", choices=CRITIC_LOSSES)
    ts_schedule: bool = option(False, "Score times from the next ladder step upwards.")
    ts_schedule_max: bool = option(False, "Score times up to the current ladder step.")
    score_low: float = option(0.02, "Lowest sigma at which scores are compared.")
    score_high: float = option(0.98, "Highest sigma at which scores are compared.")
    ema_decay: float = option(0.99, "Decay of the averaged student, once a student update.")
    ema_start: int = option(200, "Iteration up to which the average is a plain copy.")
    batch_size: int = option(1, "Clips a GPU holds at once.")
    global_batch: int = option(64, "Clips an update averages over: batch size x GPUs x accumulation.")
    checkpoint_every: int = option(500, "Iterations from one checkpoint to the next.")
    keep: int = option(3, "Newest checkpoints to keep.")
    seed: int = option(0, "Seed of data order, noise and exits.")
    dtype: str = option("bfloat16", "Precision of the networks; master weights are float32.", choices=DTYPES)
    activation_checkpointing: bool = option(True, "Recompute activations in the backward pass to save memory.")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one.", choices=DEVICES)

    def __post_init__(self) -> None:
        _ = self.spec, self.sigmas
        for name in ("student_every", "batch_size", "global_batch", "checkpoint_every", "keep", "iterations"):
            at_least(name, vars(self)[name], 1)
        for name in ("ema_decay", "beta1", "beta2", "score_low", "score_high"):
            _check_share(name, vars(self)[name])
        at_least("critic_warmup", self.critic_warmup, 0)
        at_least("grad_clip", self.grad_clip, 0)
        at_least("shift", self.shift, 1)
        one_of("critic_loss", self.critic_loss, CRITIC_LOSSES)
        one_of("dtype", self.dtype, DTYPES)

    @property
    def spec(self) -> VideoSpec:
        """Size of the videos."""
        return VideoSpec(self.num_frames, self.height, self.width, self.fps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ladder's noise levels."""
        return ladder(self.ladder, s=self.shift)


@dataclass(frozen=True)
class SampleConfig:
    """What `sample` makes of a checkpoint."""

    checkpoint: str = option(
        help="Folder of a run (its best checkpoint is used, else its newest) or of one checkpoint."
    )
    model: str = option(help="Model folder or hub name.")
    out: str = option(help="An .mp4 file for --prompt, a folder for --data.")
    prompt: str | None = option(None, "Text of one video.")
    image: str | None = option(None, "First frame of one video; without it the prompt alone decides.")
    data: str | None = option(None, "CSV of many videos, columns prompt, image, seed.")
    seed: int = option(0, "Seed of the noise; a seed in the CSV wins.")
    ladder: tuple[float, ...] | None = option(None, "Sample with other steps than the checkpoint was trained on.")
    weights: str = option("ema", "Weights to sample from.", choices=WEIGHTS)
    batch_size: int = option(1, "Videos sampled at once.")
    dtype: str = option("bfloat16", "Precision of the network.", choices=DTYPES)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one.", choices=DEVICES)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.data is None):
            raise ValueError("give either --prompt TEXT or --data CSV")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty: say what the video shows")
        if self.prompt is not None and not self.out.endswith(".mp4"):
            raise ValueError(f"out={self.out}: must end in .mp4 for a single video")
        if self.data is not None and self.image is not None:
            raise ValueError("--image goes with --prompt; a CSV names its images in the column image")
        at_least("batch_size", self.batch_size, 1)
        one_of("weights", self.weights, WEIGHTS)
        one_of("dtype", self.dtype, DTYPES)

    def sigmas(self, shift: float) -> tuple[float, ...] | None:
        """Noise levels of an explicit ladder; None = the checkpoint's own."""
        return None if self.ladder is None else ladder(self.ladder, s=shift)


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` compares, and how."""

    checkpoint: tuple[str, ...] = option(help="Folder of a run or of one checkpoint; several times adds others.")
    shards: str = option(help="Data set made by encode: the conditions.")
    model: str = option(help="Model folder or hub name: the teacher, and the VAE for the videos.")
    out: str = option(help="Folder for latents, videos, report.json and report.html; the same command goes on.")
    count: int = option(2048, "Records compared, from the first; all where there are fewer.")
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of the noise.")
    teacher_steps: int = option(50, "Steps of the teacher.")
    guidance_scale: float | None = option(None, "Of the teacher; without it, what the checkpoint was distilled at.")
    weights: str = option("ema", "Weights of the checkpoints.", choices=WEIGHTS)
    select: bool = option(False, "First score every checkpoint of the run and write the name of the best to RUN/best.")
    videos: int = option(256, "Videos a set that are decoded and looked at; 0 = latents only.")
    shown: int = option(4, "Conditions whose videos are in the report.")
    analyser: str | None = option(None, "Python file with judge(video, prompt) -> {question: True or False}.")
    i3d: str | None = option(None, "TorchScript file of an I3D network, for the Frechet video distance.")
    clip: str | None = option(None, "Folder of a CLIP model in the layout of transformers, for the CLIP score.")
    batch_size: int = option(1, "Videos sampled, and decoded, at once.")
    dtype: str = option("bfloat16", "Precision of the networks.", choices=DTYPES)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one.", choices=DEVICES)

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint: name at least one run")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={','.join(map(str, self.seeds))}: needs numbers that differ")
        at_least("count", self.count, 2)
        for name in ("teacher_steps", "batch_size"):
            at_least(name, vars(self)[name], 1)
        for name in ("videos", "shown"):
            at_least(name, vars(self)[name], 0)
        one_of("weights", self.weights, WEIGHTS)
        one_of("dtype", self.dtype, DTYPES)
