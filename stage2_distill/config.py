"""Options of training."""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

from common.flow import timestep_sigmas
from common.options import MODEL_HELP, check_fields, device_option, max_text_tokens_option, option, size_option
from common.video import VideoSpec

Part = TypeVar("Part")
DTYPES = ("float32", "bfloat16")
EXACT, FP8 = PRECISIONS = ("exact", "fp8")  # of the products of the blocks: in the dtype, or in 8 bits
AUTO, STANDARD, COMPACT = "auto", "standard", "compact"
OPTIMIZER_FORMS, MOMENT_FORMATS = (AUTO, STANDARD, COMPACT), ("8bit", "float32")
ACTIVATION_CHECKPOINTING = ("full", "offload", "selective", "selective-mlp", "off")
OLD_ACTIVATION_CHECKPOINTING = dict(
    zip(("none", "host", "attention", "results", "all"), ACTIVATION_CHECKPOINTING, strict=True)
)
OFFLOAD_CHOICES = ("none", "average", "all")
ATTENTION_KERNELS = ("auto", "torch", "cudnn", "flash", "efficient", "math")
CRITIC_LOSSES = ("x0", "flow", "noise")
WANDB_MODES = ("off", "online", "offline")
EXIT_SCHEDULES = ("random", "stratified")

MIN_FRAMES = 5  # one latent frame after the first

advanced = partial(option, advanced=True)  # an option that only --help-all lists


@dataclass(frozen=True)
class LengthShare:
    """A number of frames, and the share of the samples that have it."""

    num_frames: int
    share: float


def parse_lengths(value: int | str) -> tuple[LengthShare, ...]:
    """The lengths of option `num_frames`, the shortest first; ValueError if one or its weight is not valid."""
    weights: dict[int, float] = {}
    for part in str(value).split(","):
        frames_text, colon, weight_text = part.partition(":")
        try:
            frames, weight = int(frames_text), float(weight_text) if colon else 1.0
        except ValueError as error:
            problem = "must be numbers of frames, such as 81,121 or 81:0.3,121:0.7"
            raise ValueError(f"num_frames={value}: {problem}") from error
        _ = VideoSpec(frames)  # which names the nearest valid numbers
        if frames < MIN_FRAMES:
            raise ValueError(f"num_frames={frames}: must be at least {MIN_FRAMES}")
        if frames in weights:
            raise ValueError(f"num_frames={value}: names {frames} twice; give one weight to each")
        if not 0 < weight < math.inf:
            raise ValueError(f"num_frames={value}: the weight of {frames} is {weight:g}; give a number above 0")
        weights[frames] = weight
    total = sum(weights.values())
    return tuple(LengthShare(frames, weight / total) for frames, weight in sorted(weights.items()))


def check_precision(precision: str, dtype: str) -> None:
    """Raise ValueError if products are in 8 bits and the network computes in another dtype than bfloat16."""
    if precision == FP8 and dtype != "bfloat16":
        raise ValueError(f"precision=fp8: needs dtype=bfloat16, not {dtype}; give one of the two its default")


@dataclass(frozen=True)
class DistillConfig:
    """Options of `distill`; the defaults are the published recipe (quanhaol/Wan2.2-TI2V-5B-Turbo)."""

    shards: tuple[str, ...] = option(
        help="Data set made by encode; repeat the option as FOLDER:WEIGHT to mix data sets.", path="any", group="data"
    )
    model: str = option(help=MODEL_HELP, path="any", group="model")
    out: str = option(help="Folder of the run.", path="output", group="output")
    init_from: str | None = advanced(
        None,
        "Run, checkpoint, model folder or file of weights that student and critic start from.",
        path="input",
        group="model",
    )
    base_lora: tuple[str, ...] | None = advanced(
        None, "LoRA file, FILE or FILE:WEIGHT, added to the model before anything else; may be repeated.",
        path="input", group="model",
    )  # fmt: skip
    iterations: int = option(4000, "Iterations in total; each updates the critic once.", minimum=1, group="recipe")
    num_frames: int | str = advanced(
        VideoSpec.num_frames, "Frames of a video, 4k+1; or several, of which each sample draws one: 81,121, or with "
        "weights 81:0.3,121:0.7.", minimum=MIN_FRAMES, group="size",
    )  # fmt: skip
    height: int = size_option("height", advanced=True)
    width: int = size_option("width", advanced=True)
    fps: int = size_option("fps", advanced=True)
    timesteps: tuple[float, ...] = advanced(
        (1000.0, 750.0, 500.0, 250.0), "Timesteps of the student, before the shift.", group="recipe", old_name="ladder"
    )
    shift: float = advanced(5.0, "Shift of the noise levels.", minimum=1, group="recipe")
    guidance_scale: float = advanced(7.0, "Teacher: uncond + scale * (cond - uncond).", group="recipe")
    guidance_rescale: float = advanced(
        0.0, "Share by which the contrast that guidance adds to the teacher's predictions is taken back.",
        minimum=0, maximum=1, group="recipe",
    )  # fmt: skip
    decoupled_guidance: bool = advanced(
        False, "The student follows the guidance at noise levels of its own, not at those of matching.", group="recipe"
    )
    student_lr: float = option(5e-7, "Learning rate of the student.", minimum=0, group="recipe")
    critic_lr: float = option(1e-7, "Learning rate of the critic.", minimum=0, group="recipe")
    lr_warmup: int = advanced(
        0, "Updates of each role over which its learning rate rises.", minimum=0, group="optimizer", old_name="warmup"
    )
    lr_cooldown: int = advanced(
        0, "Last iterations, over which both rates fall to 0.", minimum=0, group="optimizer", old_name="cooldown"
    )
    beta1: float = advanced(0.0, "AdamW.", minimum=0, maximum=1, group="optimizer")
    beta2: float = advanced(0.999, "AdamW.", minimum=0, maximum=1, group="optimizer")
    eps: float = advanced(1e-8, "AdamW.", minimum=0, group="optimizer")
    weight_decay: float = advanced(0.01, "AdamW, on all parameters.", minimum=0, group="optimizer")
    grad_clip: float = advanced(10.0, "Largest global gradient norm, both roles.", above=0, group="optimizer")
    student_update_interval: int = advanced(
        5, "Iterations from one student update to the next.", minimum=1, group="recipe", old_name="student_every"
    )
    teacher_warmup: int = advanced(
        0, "First iterations, which update the student only: it regresses to the end of the teacher's path.",
        minimum=0, group="recipe",
    )  # fmt: skip
    critic_warmup: int = advanced(0, "Iterations after those, which update the critic only.", minimum=0, group="recipe")
    critic_loss: str = advanced("x0", "The critic regresses x0, flow or noise.", choices=CRITIC_LOSSES, group="recipe")
    critic_ema_decay: float = advanced(
        0.0, "Decay per update of an averaged critic, whose score the student follows; 0 = the critic itself.",
        minimum=0, maximum=1, group="recipe",
    )  # fmt: skip
    ida_share: float = advanced(
        0.0, "Share by which the critic moves to the student after each of its updates (IDA).",
        minimum=0, maximum=1, group="recipe",
    )  # fmt: skip
    regression_weight: float = advanced(
        0.0, "Weight of the regression of the student onto the end of the teacher's path; 0 = none.",
        minimum=0, group="recipe",
    )  # fmt: skip
    regression_steps: int = advanced(10, "Steps of the teacher on that path.", minimum=1, group="recipe")
    text_only_fraction: float = advanced(
        0.0, "Share of samples trained without their first frame.", minimum=0, maximum=1, group="data"
    )
    first_frame_jitter: float = advanced(
        0.0, "Share of samples whose first frame has about 3 % of the video's time instead of 0.",
        minimum=0, maximum=1, group="data",
    )  # fmt: skip
    exit_schedule: str = advanced(
        "random", "Exits of the rollout: drawn, or each step equally often.", choices=EXIT_SCHEDULES, group="recipe"
    )
    anchor_weight: float = advanced(
        0.0, "Weight of the anchor of the student's first step at the teacher's first steps from the same noise.",
        minimum=0, group="recipe",
    )  # fmt: skip
    anchor_steps: int = advanced(
        5, "Of 24 steps of the teacher, those whose mean velocity the first step is anchored at.",
        minimum=1, maximum=24, group="recipe",
    )  # fmt: skip
    exit_weights: tuple[float, ...] | None = advanced(
        None, "Weights of matching by the step at which the rollout ends, one per timestep; by default all are 1.",
        minimum=0, group="recipe",
    )  # fmt: skip
    temporal_variance_weight: float = advanced(
        0.0, "Weight of a term that adds motion to samples with less of it than the teacher's predictions of them.",
        minimum=0, group="recipe",
    )  # fmt: skip
    temporal_variance_cutoff: float = advanced(
        1.0, "The term acts on samples whose variance over time is below this many times the teacher's.",
        above=0, group="recipe",
    )  # fmt: skip
    rollout_reuse: bool = advanced(False, "One rollout serves several updates of the critic.", group="recipe")
    ts_schedule: bool = advanced(False, "Score times from the next timestep upwards.", group="recipe")
    ts_schedule_max: bool = advanced(False, "Score times up to the current timestep.", group="recipe")
    score_low: float = advanced(0.02, "Lowest sigma of the scores.", minimum=0, maximum=1, group="recipe")
    score_high: float = advanced(0.98, "Highest sigma of the scores.", minimum=0, maximum=1, group="recipe")
    score_time_low_share: float = advanced(
        0.0, "Share of samples that are matched at a low sigma, log-uniform from 0.01 to 0.5.",
        minimum=0, maximum=1, group="recipe",
    )  # fmt: skip
    critic_time_low_share: float = advanced(
        0.0, "The same share when the critic is trained.", minimum=0, maximum=1, group="recipe"
    )
    ema_decay: float = advanced(0.99, "Decay per update of the averaged student.", minimum=0, maximum=1, group="recipe")
    ema_start: int = advanced(200, "Iteration up to which the average copies the student.", minimum=0, group="recipe")
    batch_size: int = option(1, "Clips that a GPU processes at once.", minimum=1, group="recipe")
    global_batch: int = option(64, "Clips per update: batch size x GPUs x accumulation.", minimum=1, group="recipe")
    replicate: int = advanced(1, "Copies of the networks, each sharded (HSDP).", minimum=1, group="devices")
    checkpoint_every: int = advanced(500, "Iterations from one checkpoint to the next.", minimum=1, group="checkpoint")
    async_checkpoint: bool = advanced(
        True, "Write checkpoints during training, from a copy in host memory.",
        group="checkpoint", old_name="checkpoint_beside",
    )  # fmt: skip
    keep_last: int = advanced(3, "Newest checkpoints to keep.", minimum=1, group="checkpoint", old_name="keep")
    keep_every: int = advanced(
        0, "Also keep each checkpoint whose iteration is a multiple of this; 0 = none.", minimum=0, group="checkpoint"
    )
    lora_rank: int = option(
        0, "Train adapters of this rank on one frozen base instead of all weights, with larger learning rates; "
        "0 = train all weights.", minimum=0, group="model",
    )  # fmt: skip
    lora_alpha: float | None = advanced(
        None, "Adapters are scaled by alpha / rank; by default alpha is the rank.", above=0, group="model"
    )
    seed: int = advanced(0, "Seed of data order, noise and exits.", group="recipe")
    dtype: str = advanced(
        "bfloat16", "Precision of the computation; masters are float32.", choices=DTYPES, group="model"
    )
    optimizer_form: str = advanced(
        AUTO, "Float32 master weights, or the compact form; auto: standard if it fits in memory.",
        choices=OPTIMIZER_FORMS, group="memory", old_name="memory",
    )  # fmt: skip
    second_moment: str = advanced(
        "8bit", "Format of the second moment in the compact form.", choices=MOMENT_FORMATS, group="memory"
    )
    offload: str = option(
        "average", "Kept in host memory by the compact form, if each GPU holds a whole copy; all, and average if "
        "gradients accumulate, include the student's optimizer state.", choices=OFFLOAD_CHOICES, group="memory",
    )  # fmt: skip
    activation_checkpointing: str = option(
        "selective", "What a block recomputes in its backward pass: everything (full; offload also moves its input to "
        "host memory), all but attention (selective), all but attention and feed-forward (selective-mlp), or nothing "
        "(off).", choices=ACTIVATION_CHECKPOINTING, group="memory",
        old_name="keep_activations", old_values=OLD_ACTIVATION_CHECKPOINTING,
    )  # fmt: skip
    max_text_tokens: int = max_text_tokens_option(advanced=True, old_name="text_rows")
    attention: str = advanced(
        "auto",
        "Kernel of attention; auto: FlashAttention-3 or cuDNN in bf16.",
        choices=ATTENTION_KERNELS,
        group="model",
    )
    compile: bool = advanced(False, "Compile the blocks: a minute at first, then a quarter faster.", group="speed")
    preview_every: int = advanced(0, "Iterations from one preview to the next; 0 = none.", minimum=0, group="logging")
    preview_count: int = advanced(4, "Records of a preview: the first of its data set.", minimum=0, group="logging")
    preview_data: str | None = advanced(
        None, "Data set of the previews; by default that of training.", path="any", group="logging"
    )
    wandb: str = option("off", "Log to W&B too (needs the extra wandb).", choices=WANDB_MODES, group="logging")
    device: str = device_option(advanced=True)

    def __post_init__(self) -> None:
        if self.second_moment == "bfloat16":
            raise ValueError(
                "second_moment=bfloat16: no longer supported; finish the run with release 0.1.0, or start another one "
                "from it with --init-from"
            )
        check_fields(self)
        _ = self.spec, self.sigmas
        self.check_combinations()
        self.check_student_terms()

    def check_combinations(self) -> None:
        """Raise ValueError if one value does not fit another."""
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"lora_alpha={self.lora_alpha}: needs --lora-rank")
        if self.score_low >= self.score_high:
            raise ValueError(f"score_low={self.score_low}: must be less than score_high={self.score_high}")
        if self.preview_every and not self.preview_count:
            raise ValueError("preview_count=0: must be at least 1, or preview_every=0")
        if len(self.lengths) > 1:
            self.check_many_shapes()
        if self.optimizer_form == COMPACT:
            self.check_compact()

    def check_many_shapes(self) -> None:
        """Raise ValueError if an option does not support videos of several shapes."""
        if self.rollout_reuse and self.batch_size > 1:
            raise ValueError(
                f"batch_size={self.batch_size}: rollout_reuse and videos of several sizes or lengths need "
                "micro-batches of one; use --batch-size 1, or --no-rollout-reuse"
            )

    def check_student_terms(self) -> None:
        """Raise ValueError if an option of what the student follows has nothing to act on."""
        if self.guidance_rescale and self.guidance_scale == 1:
            raise ValueError(
                f"guidance_rescale={self.guidance_rescale:g}: needs a guidance_scale other than 1, which is no guidance"
            )
        if self.decoupled_guidance and self.guidance_scale == 1:
            raise ValueError("decoupled_guidance=True: needs a guidance_scale other than 1, which is no guidance")
        if self.exit_weights is not None and len(self.exit_weights) != len(self.timesteps):
            given = ",".join(f"{weight:g}" for weight in self.exit_weights)
            raise ValueError(f"exit_weights={given}: give {len(self.timesteps)} numbers, one for each timestep")

    def check_compact(self) -> None:
        """Raise ValueError if the compact form does not support another option."""
        remedy = f"use optimizer_form={STANDARD}"
        if self.lora_rank:
            raise ValueError(f"lora_rank={self.lora_rank}: adapters are small and need no compact form; {remedy}")
        if self.dtype != "bfloat16":
            raise ValueError(f"dtype={self.dtype}: optimizer_form=compact stores bfloat16 weights; {remedy}")
        if self.beta1 != 0:
            raise ValueError(f"beta1={self.beta1}: optimizer_form=compact has no first moment; use 0, or {remedy}")

    @property
    def lengths(self) -> tuple[LengthShare, ...]:
        """The numbers of frames of the videos, the shortest first."""
        return parse_lengths(self.num_frames)

    @property
    def spec(self) -> VideoSpec:
        """Size of the longest videos."""
        return VideoSpec(self.lengths[-1].num_frames, self.height, self.width, self.fps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the timesteps after the shift, falling, each in (0, 1]."""
        return timestep_sigmas(self.timesteps, s=self.shift)

    def accumulation_steps(self, world: int) -> int:
        """Micro-batches that each of `world` ranks takes for an update; ValueError if they do not give the batch."""
        step_size = self.batch_size * world
        if self.global_batch % step_size:
            low = max(1, self.global_batch // step_size) * step_size
            raise ValueError(
                f"global_batch={self.global_batch}: not a multiple of batch_size {self.batch_size} x {world} "
                f"ranks; nearest are {low} and {low + step_size}"
            )
        return self.global_batch // step_size

    def select(self, kind: type[Part], **others: Any) -> Part:  # noqa: ANN401
        """Build a record of the options that `kind` has a field for; `others` are its fields that are no options."""
        shared = {item.name: vars(self)[item.name] for item in fields(kind) if item.name not in others}  # type: ignore[arg-type]
        return kind(**shared, **others)


def ranks_per_copy(world: int, replicate: int) -> int:
    """Ranks that share one copy of the networks; ValueError if `replicate` copies do not divide `world` ranks."""
    if world % replicate:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(f"replicate={replicate}: does not divide {world} ranks; possible are {divisors}")
    return world // replicate
