"""Options of training."""

from dataclasses import dataclass

from common.flow import ladder
from common.options import MODEL, at_least, check_text_rows, device_option, one_of, option, size_option
from common.video import TEXT_LENGTH, VideoSpec

DTYPES = ("float32", "bfloat16")
AUTO, STANDARD, COMPACT = "auto", "standard", "compact"
MEMORIES, MOMENTS = (AUTO, STANDARD, COMPACT), ("8bit", "bfloat16", "float32")
KEEPS = ("none", "host", "attention", "results", "all")
OFFLOADS = ("none", "average", "all")
ATTENTIONS = ("auto", "torch", "cudnn", "flash", "efficient", "math")
CRITIC_LOSSES = ("x0", "flow", "noise")
WANDB = ("off", "online", "offline")
EXIT_SCHEDULES = ("random", "stratified")
NOT_NEGATIVE = (
    "keep_every",
    "critic_warmup", "warmup", "cooldown", "ema_start", "student_lr", "critic_lr", "eps", "weight_decay",
    "preview_every", "lora_rank",
)  # fmt: skip
SHARES = ("ema_decay", "beta1", "beta2", "score_low", "score_high", "text_only_fraction", "first_frame_jitter")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must be between 0 and 1")


@dataclass(frozen=True)
class DistillConfig:
    """What `distill` does; the defaults are the published recipe (quanhaol/Wan2.2-TI2V-5B-Turbo)."""

    shards: tuple[str, ...] = option(help="Data set made by encode; FOLDER:WEIGHT, several times, mixes data sets.")
    model: str = option(help=MODEL)
    out: str = option(help="Folder of the run.")
    init_from: str | None = option(None, "Start student and critic from this run, checkpoint or model folder instead.")
    iterations: int = option(4000, "Iterations in all; each updates the critic once.")
    num_frames: int = size_option("num_frames")
    height: int = size_option("height")
    width: int = size_option("width")
    fps: int = size_option("fps")
    ladder: tuple[float, ...] = option((1000.0, 750.0, 500.0, 250.0), "The student's steps, before the shift.")
    shift: float = option(5.0, "Shift of the noise levels.")
    guidance_scale: float = option(7.0, "Teacher: uncond + scale * (cond - uncond).")
    student_lr: float = option(5e-7, "Learning rate of the student.")
    critic_lr: float = option(1e-7, "Learning rate of the critic.")
    warmup: int = option(0, "Updates of each role over which its learning rate rises to the full one.")
    cooldown: int = option(0, "Last iterations, over which both learning rates fall evenly to nothing.")
    beta1: float = option(0.0, "AdamW.")
    beta2: float = option(0.999, "AdamW.")
    eps: float = option(1e-8, "AdamW.")
    weight_decay: float = option(0.01, "AdamW, on all parameters.")
    grad_clip: float = option(10.0, "Largest global gradient norm, both roles.")
    student_every: int = option(5, "Iterations from one student update to the next.")
    critic_warmup: int = option(0, "First iterations that leave the student alone.")
    critic_loss: str = option("x0", "Critic regresses x0, flow (velocity) or noise.", choices=CRITIC_LOSSES)
    text_only_fraction: float = option(0.0, "Share of samples trained without their first frame.")
    first_frame_jitter: float = option(
        0.0, "Share of samples whose first frame has about 3 % of the video's time, not 0."
    )
    exit_schedule: str = option(
        "random", "Exits of the rollout: drawn, or each step equally often.", choices=EXIT_SCHEDULES
    )
    rollout_reuse: bool = option(False, "Critic: one rollout serves the updates between two of the student.")
    ts_schedule: bool = option(False, "Score times from the next ladder step upwards.")
    ts_schedule_max: bool = option(False, "Score times up to the current ladder step.")
    score_low: float = option(0.02, "Lowest sigma at which scores are compared.")
    score_high: float = option(0.98, "Highest sigma at which scores are compared.")
    ema_decay: float = option(0.99, "Decay of the averaged student, once a student update.")
    ema_start: int = option(200, "Iteration up to which the average is a plain copy.")
    batch_size: int = option(1, "Clips a GPU holds at once.")
    global_batch: int = option(64, "Clips an update averages over: batch size x GPUs x accumulation.")
    replicate: int = option(1, "Copies of the networks, each sharded over GPUs / copies (HSDP).")
    checkpoint_every: int = option(500, "Iterations from one checkpoint to the next.")
    checkpoint_beside: bool = option(True, "Write checkpoints while training goes on, from a copy in host memory.")
    keep: int = option(3, "Newest checkpoints to keep.")
    keep_every: int = option(0, "Also keep the checkpoints of every so many iterations; 0 = none.")
    lora_rank: int = option(
        0,
        "Train adapters of this rank on one frozen base instead of all weights; 0 = all. Wants larger learning rates.",
    )
    lora_alpha: float | None = option(None, "Adapters count alpha / rank; without it alpha is the rank.")
    seed: int = option(0, "Seed of data order, noise and exits.")
    dtype: str = option("bfloat16", "Precision of the networks; master weights are float32.", choices=DTYPES)
    memory: str = option(AUTO, "Float32 masters, or the compact form; auto: standard where it fits.", choices=MEMORIES)
    second_moment: str = option("8bit", "Of the compact form.", choices=MOMENTS)
    offload: str = option(
        "average",
        "Compact form, a whole copy a GPU: what waits in host memory; all, or average and gradients accumulate: "
        "the student's optimizer's state too.",
        choices=OFFLOADS,
    )  # fmt: skip
    keep_activations: str = option(
        "attention", "What a block keeps for its backward pass; the rest is computed again. host: its input, in host "
        "memory; results: attention's and the feed-forward's.", choices=KEEPS,
    )  # fmt: skip
    text_rows: int = option(TEXT_LENGTH, "Text rows computed; fewer are quicker and the same, if prompts are short.")
    attention: str = option("auto", "Kernel of attention; auto: FlashAttention-3 or cuDNN in bf16.", choices=ATTENTIONS)
    compile: bool = option(False, "Compile the blocks first: a minute at the start, then a quarter faster on a GPU.")
    preview_every: int = option(0, "Iterations from one preview to the next; 0 = none.")
    preview_count: int = option(4, "Conditions of a preview: the first of the preview's data set.")
    preview_data: str | None = option(None, "Data set of the previews' conditions; without it, that of the training.")
    wandb: str = option("off", "Curves on Weights & Biases too (needs the extra wandb).", choices=WANDB)
    device: str = device_option()

    def __post_init__(self) -> None:
        _ = self.spec, self.sigmas
        for name in (
            "student_every",
            "batch_size",
            "global_batch",
            "replicate",
            "checkpoint_every",
            "keep",
            "iterations",
        ):
            at_least(name, vars(self)[name], 1)
        for name in SHARES:
            _check_share(name, vars(self)[name])
        for name in NOT_NEGATIVE:
            at_least(name, vars(self)[name], 0)
        self.check_pairs()
        check_text_rows(self.text_rows)
        at_least("num_frames", self.num_frames, 5)  # one latent frame more than the first
        at_least("shift", self.shift, 1)
        one_of("critic_loss", self.critic_loss, CRITIC_LOSSES)
        one_of("exit_schedule", self.exit_schedule, EXIT_SCHEDULES)
        one_of("wandb", self.wandb, WANDB)
        one_of("offload", self.offload, OFFLOADS)
        one_of("dtype", self.dtype, DTYPES)
        if self.memory == COMPACT:
            self.check_compact()

    def check_pairs(self) -> None:
        """Raise ValueError where a number makes no sense, or not beside another."""
        if self.lora_alpha is not None and (self.lora_alpha <= 0 or not self.lora_rank):
            raise ValueError(f"lora_alpha={self.lora_alpha}: must be more than 0, and goes with --lora-rank")
        if self.grad_clip <= 0:
            raise ValueError(f"grad_clip={self.grad_clip}: must be more than 0; a large number does not clip")
        if self.score_low >= self.score_high:
            raise ValueError(f"score_low={self.score_low}: must be less than score_high={self.score_high}")
        if self.preview_every:
            at_least("preview_count", self.preview_count, 1)

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
        return ladder(self.ladder, s=self.shift)
