"""Options of training."""

from dataclasses import dataclass

from common.flow import timestep_sigmas
from common.options import MODEL_HELP, check_fields, device_option, max_text_tokens_option, option, size_option
from common.video import VideoSpec

DTYPES = ("float32", "bfloat16")
AUTO, STANDARD, COMPACT = "auto", "standard", "compact"
OPTIMIZER_FORMS, MOMENT_FORMATS = (AUTO, STANDARD, COMPACT), ("8bit", "bfloat16", "float32")
ACTIVATION_CHECKPOINTING = ("full", "offload", "selective", "selective-mlp", "off")
OLD_ACTIVATION_CHECKPOINTING = {
    "none": "full",
    "host": "offload",
    "attention": "selective",
    "results": "selective-mlp",
    "all": "off",
}
OFFLOAD_CHOICES = ("none", "average", "all")
ATTENTION_KERNELS = ("auto", "torch", "cudnn", "flash", "efficient", "math")
CRITIC_LOSSES = ("x0", "flow", "noise")
WANDB_MODES = ("off", "online", "offline")
EXIT_SCHEDULES = ("random", "stratified")


@dataclass(frozen=True)
class DistillConfig:
    """What `distill` does; the defaults are the published recipe (quanhaol/Wan2.2-TI2V-5B-Turbo)."""

    shards: tuple[str, ...] = option(
        help="Data set made by encode; FOLDER:WEIGHT, several times, mixes data sets.", group="data"
    )
    model: str = option(help=MODEL_HELP, group="model")
    out: str = option(help="Folder of the run.", group="output")
    init_from: str | None = option(
        None,
        "Start student and critic from this run, checkpoint or model folder instead.",
        group="model",
        advanced=True,
    )
    iterations: int = option(4000, "Iterations in all; each updates the critic once.", minimum=1, group="recipe")
    num_frames: int = size_option("num_frames", minimum=5, advanced=True)  # one latent frame beyond the first
    height: int = size_option("height", advanced=True)
    width: int = size_option("width", advanced=True)
    fps: int = size_option("fps", advanced=True)
    timesteps: tuple[float, ...] = option(
        (1000.0, 750.0, 500.0, 250.0),
        "The student's steps, before the shift.",
        group="recipe",
        advanced=True,
        old_name="ladder",
    )
    shift: float = option(5.0, "Shift of the noise levels.", minimum=1, group="recipe", advanced=True)
    guidance_scale: float = option(7.0, "Teacher: uncond + scale * (cond - uncond).", group="recipe", advanced=True)
    student_lr: float = option(5e-7, "Learning rate of the student.", minimum=0, group="recipe")
    critic_lr: float = option(1e-7, "Learning rate of the critic.", minimum=0, group="recipe")
    lr_warmup: int = option(
        0,
        "Updates of each role over which its learning rate rises to the full one.",
        minimum=0,
        group="optimizer",
        advanced=True,
        old_name="warmup",
    )
    lr_cooldown: int = option(
        0,
        "Last iterations, over which both learning rates fall evenly to nothing.",
        minimum=0,
        group="optimizer",
        advanced=True,
        old_name="cooldown",
    )
    beta1: float = option(0.0, "AdamW.", minimum=0, maximum=1, group="optimizer", advanced=True)
    beta2: float = option(0.999, "AdamW.", minimum=0, maximum=1, group="optimizer", advanced=True)
    eps: float = option(1e-8, "AdamW.", minimum=0, group="optimizer", advanced=True)
    weight_decay: float = option(0.01, "AdamW, on all parameters.", minimum=0, group="optimizer", advanced=True)
    grad_clip: float = option(
        10.0, "Largest global gradient norm, both roles.", above=0, group="optimizer", advanced=True
    )
    student_update_interval: int = option(
        5,
        "Iterations from one student update to the next.",
        minimum=1,
        group="recipe",
        advanced=True,
        old_name="student_every",
    )
    critic_warmup: int = option(
        0, "First iterations that leave the student alone.", minimum=0, group="recipe", advanced=True
    )
    critic_loss: str = option(
        "x0", "Critic regresses x0, flow (velocity) or noise.", choices=CRITIC_LOSSES, group="recipe", advanced=True
    )
    text_only_fraction: float = option(
        0.0, "Share of samples trained without their first frame.", minimum=0, maximum=1, group="data", advanced=True
    )
    first_frame_jitter: float = option(
        0.0,
        "Share of samples whose first frame has about 3 % of the video's time, not 0.",
        minimum=0,
        maximum=1,
        group="data",
        advanced=True,
    )
    exit_schedule: str = option(
        "random",
        "Exits of the rollout: drawn, or each step equally often.",
        choices=EXIT_SCHEDULES,
        group="recipe",
        advanced=True,
    )
    rollout_reuse: bool = option(
        False, "Critic: one rollout serves the updates between two of the student.", group="recipe", advanced=True
    )
    ts_schedule: bool = option(False, "Score times from the next ladder step upwards.", group="recipe", advanced=True)
    ts_schedule_max: bool = option(False, "Score times up to the current ladder step.", group="recipe", advanced=True)
    score_low: float = option(
        0.02, "Lowest sigma at which scores are compared.", minimum=0, maximum=1, group="recipe", advanced=True
    )
    score_high: float = option(
        0.98, "Highest sigma at which scores are compared.", minimum=0, maximum=1, group="recipe", advanced=True
    )
    ema_decay: float = option(
        0.99,
        "Decay of the averaged student, once a student update.",
        minimum=0,
        maximum=1,
        group="recipe",
        advanced=True,
    )
    ema_start: int = option(
        200, "Iteration up to which the average is a plain copy.", minimum=0, group="recipe", advanced=True
    )
    batch_size: int = option(1, "Clips a GPU holds at once.", minimum=1, group="recipe")
    global_batch: int = option(
        64, "Clips an update averages over: batch size x GPUs x accumulation.", minimum=1, group="recipe"
    )
    replicate: int = option(
        1, "Copies of the networks, each sharded over GPUs / copies (HSDP).", minimum=1, group="devices", advanced=True
    )
    checkpoint_every: int = option(
        500, "Iterations from one checkpoint to the next.", minimum=1, group="checkpoint", advanced=True
    )
    async_checkpoint: bool = option(
        True,
        "Write checkpoints while training goes on, from a copy in host memory.",
        group="checkpoint",
        advanced=True,
        old_name="checkpoint_beside",
    )
    keep_last: int = option(
        3, "Newest checkpoints to keep.", minimum=1, group="checkpoint", advanced=True, old_name="keep"
    )
    keep_every: int = option(
        0,
        "Also keep the checkpoints of every so many iterations; 0 = none.",
        minimum=0,
        group="checkpoint",
        advanced=True,
    )
    lora_rank: int = option(
        0,
        "Train adapters of this rank on one frozen base instead of all weights; 0 = all. Wants larger learning rates.",
        minimum=0,
        group="model",
    )
    lora_alpha: float | None = option(
        None, "Adapters count alpha / rank; without it alpha is the rank.", above=0, group="model", advanced=True
    )
    seed: int = option(0, "Seed of data order, noise and exits.", group="recipe", advanced=True)
    dtype: str = option(
        "bfloat16",
        "Precision of the networks; master weights are float32.",
        choices=DTYPES,
        group="model",
        advanced=True,
    )
    optimizer_form: str = option(
        AUTO,
        "Float32 masters, or the compact form; auto: standard where it fits.",
        choices=OPTIMIZER_FORMS,
        group="memory",
        advanced=True,
        old_name="memory",
    )
    second_moment: str = option("8bit", "Of the compact form.", choices=MOMENT_FORMATS, group="memory", advanced=True)
    offload: str = option(
        "average",
        "Compact form, a whole copy a GPU: what waits in host memory; all, or average and gradients accumulate: "
        "the student's optimizer's state too.",
        choices=OFFLOAD_CHOICES,
    group="memory", advanced=True)  # fmt: skip
    activation_checkpointing: str = option(
        "selective", "What a block recomputes in its backward pass: everything (full; offload: and keeps its input in "
        "host memory), all but attention (selective) and the feed-forward (selective-mlp), or nothing (off).", choices=ACTIVATION_CHECKPOINTING,
    group="memory", old_name="keep_activations", old_values=OLD_ACTIVATION_CHECKPOINTING)  # fmt: skip
    max_text_tokens: int = max_text_tokens_option(advanced=True, old_name="text_rows")
    attention: str = option(
        "auto",
        "Kernel of attention; auto: FlashAttention-3 or cuDNN in bf16.",
        choices=ATTENTION_KERNELS,
        group="model",
        advanced=True,
    )
    compile: bool = option(
        False,
        "Compile the blocks first: a minute at the start, then a quarter faster on a GPU.",
        group="speed",
        advanced=True,
    )
    preview_every: int = option(
        0, "Iterations from one preview to the next; 0 = none.", minimum=0, group="logging", advanced=True
    )
    preview_count: int = option(
        4, "Conditions of a preview: the first of the preview's data set.", minimum=0, group="logging", advanced=True
    )
    preview_data: str | None = option(
        None, "Data set of the previews' conditions; without it, that of the training.", group="logging", advanced=True
    )
    wandb: str = option(
        "off", "Curves on Weights & Biases too (needs the extra wandb).", choices=WANDB_MODES, group="logging"
    )
    device: str = device_option(advanced=True)

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.spec, self.sigmas
        self.check_pairs()
        if self.optimizer_form == COMPACT:
            self.check_compact()

    def check_pairs(self) -> None:
        """Raise ValueError where a number makes no sense, or not beside another."""
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError(f"lora_alpha={self.lora_alpha}: goes with --lora-rank")
        if self.score_low >= self.score_high:
            raise ValueError(f"score_low={self.score_low}: must be less than score_high={self.score_high}")
        if self.preview_every and not self.preview_count:
            raise ValueError("preview_count=0: must be at least 1, or preview_every=0")

    def check_compact(self) -> None:
        """Raise ValueError where the compact form cannot do what is asked."""
        if self.lora_rank:
            raise ValueError(f"lora_rank={self.lora_rank}: adapters are small; use memory=standard")
        if self.dtype != "bfloat16":
            raise ValueError(f"dtype={self.dtype}: memory=compact holds bfloat16 weights; use memory=standard")
        if self.beta1 != 0:
            raise ValueError(f"beta1={self.beta1}: memory=compact has no first moment; use 0, or memory=standard")

    @property
    def spec(self) -> VideoSpec:
        """Size of the videos."""
        return VideoSpec(self.num_frames, self.height, self.width, self.fps)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ladder's noise levels."""
        return timestep_sigmas(self.timesteps, s=self.shift)
