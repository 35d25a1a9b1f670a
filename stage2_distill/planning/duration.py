"""Seconds of a training iteration and of a video, from operations and the speeds of a card. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from common.planning.cards import (
    ATTENTION_TFLOPS,
    EAGER_FACTOR,
    HOST_LINK,
    PRODUCT_TFLOPS,
    SHARDED_RATE,
    SHARED_VIDEO_RATE,
    Card,
)
from common.video import FrameSize, VideoSpec
from stage2_distill.config import DistillConfig, ranks_per_copy
from stage2_distill.planning.memory import parameter_bytes, place_on_host
from stage2_distill.planning.network_size import TransformerSize

BACKWARD_TRAFFIC = 6  # bytes that elementwise kernels move in a backward pass, recomputed block included, per forward's
ADAPTER_FACTOR = 1.06  # a forward pass with adapters
AVERAGE_BYTES = 12  # moved per parameter when the critic's average is updated: two numbers read, one written
UPDATE_BYTES = 64  # moved per parameter in clipping, step and zeroing: 0.09 s for 5 B on an H200
# Share of a block's products and of its attention that the backward pass computes again; see activation_checkpoint.py.
RECOMPUTED = {"full": (1, 1), "offload": (1, 1), "selective": (1, 0), "selective-mlp": (0.8, 0), "off": (0, 0)}


@dataclass(frozen=True)
class ShapeShare:
    """One shape, and the share of the samples that have it."""

    share: float
    config: DistillConfig  # of a run of this shape alone


def list_shapes(config: DistillConfig, sizes: Mapping[FrameSize, float]) -> tuple[ShapeShare, ...]:
    """All shapes of a run, the largest first; sizes: {size: share of the records}, empty for the configured one."""
    if len(sizes) < 2 and len(config.lengths) == 1:
        return (ShapeShare(1.0, config),)
    shares = sizes or {config.spec.frame_size: 1.0}
    shapes = [
        ShapeShare(share * length.share, replace(config, num_frames=length.num_frames, **vars(size)))
        for size, share in shares.items()
        for length in config.lengths
    ]
    return tuple(sorted(shapes, key=lambda one: (-one.config.spec.num_tokens, one.config.height)))


def mean_over_shapes(shapes: Sequence[ShapeShare], value: Callable[[DistillConfig], float]) -> float:
    """The mean over the samples of what a run of each shape alone would have."""
    return sum(one.share * value(one.config) for one in shapes)


@dataclass(frozen=True)
class ForwardSeconds:
    """Seconds of a forward pass of one video on one GPU, in compiled blocks, by what they are spent on."""

    products: float
    attention: float
    traffic: float  # of elementwise kernels

    @property
    def total(self) -> float:
        """All of the pass."""
        return self.products + self.attention + self.traffic


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one pass of one video on one GPU."""

    forward: float  # without gradient
    gradient: float  # forward and backward


@dataclass(frozen=True)
class RolloutPasses:
    """Forward passes of the rollouts in one iteration; the last one of the student's has a gradient."""

    critic: float
    student: float
    student_updates: float = 1.0  # in this iteration


def forward_seconds(
    size: TransformerSize, spec: VideoSpec, card: Card, kernel: str, *, text_tokens: int
) -> ForwardSeconds:
    """Seconds of a forward pass without adapters."""
    flops = size.pass_flops(spec.num_tokens, text_tokens)
    # a block reads and writes 19 tensors of the width and two of the feed-forward's (LOG), in bf16
    moved = size.num_layers * spec.num_tokens * 2 * (19 * size.width + 2 * size.ffn_dim)
    return ForwardSeconds(
        flops.products / (PRODUCT_TFLOPS * card.scale * 1e12),
        flops.attention / (ATTENTION_TFLOPS[kernel][0] * card.scale * 1e12),
        moved / card.traffic,
    )


def pass_seconds(size: TransformerSize, card: Card, kernel: str, config: DistillConfig) -> PassSeconds:
    """Seconds of the passes of a training run."""
    ahead = forward_seconds(size, config.spec, card, kernel, text_tokens=config.max_text_tokens)
    forward = ahead.total * (ADAPTER_FACTOR if config.lora_rank else 1)
    attention_rate, gradient_rate = ATTENTION_TFLOPS[kernel]
    # Gradients of inputs cost a forward's products, those of weights the same; attention's backward 2.5 forwards.
    again_products, again_attention = RECOMPUTED[config.activation_checkpointing]
    products = ahead.products * ((1 if config.lora_rank else 2) + again_products)
    attention = ahead.attention * (2.5 * attention_rate / gradient_rate + again_attention)
    return PassSeconds(forward, forward + products + attention + BACKWARD_TRAFFIC * ahead.traffic)


def mean_passes(config: DistillConfig) -> RolloutPasses:
    """Forward passes of an average iteration."""
    steps, interval = len(config.timesteps), config.student_update_interval
    mean_exit = (steps + 1) / 2
    return RolloutPasses(steps / interval if config.rollout_reuse else mean_exit, mean_exit, 1 / interval)


def iteration_seconds(
    config: DistillConfig,
    size: TransformerSize,
    card: Card,
    *,
    world: int,
    form: str,
    kernel: str,
    passes: RolloutPasses | None = None,
) -> float:
    """Seconds of a mean iteration, or of one with these rollouts: updates of the critic and at times the student."""
    one, done = pass_seconds(size, card, kernel, config), passes or mean_passes(config)
    clips = config.accumulation_steps(world) * config.batch_size
    seconds = clips * clip_seconds(config, one, done) / (SHARDED_RATE if world > 1 else 1)
    if not config.compile:
        seconds *= EAGER_FACTOR
    critic_step, student_step = step_seconds(config, size, card, world=world, form=form)
    return seconds + critic_step + student_step * done.student_updates


def clip_seconds(config: DistillConfig, one: PassSeconds, done: RolloutPasses) -> float:
    """Seconds of the passes of one clip of either role's batch in a mean iteration."""
    teacher = 1 if config.guidance_scale == 1 else 2  # passes: with and without the prompt
    rollout = (done.student - 1) * one.forward + one.gradient
    critic = done.critic * one.forward + one.gradient
    scores: float = 1 + teacher * (1 + (config.regression_steps if config.regression_weight else 0))  # 1: the critic
    anchor = teacher * config.anchor_steps / len(config.timesteps) if config.anchor_weight else 0  # in one of the exits
    scores += anchor + config.decoupled_guidance  # the teacher without guidance, at the noise of matching
    matching = critic + (rollout + scores * one.forward) * done.student_updates
    warmup = rollout + teacher * config.regression_steps * one.forward
    share = min(1.0, config.teacher_warmup / config.iterations)
    return (1 - share) * matching + share * warmup


def step_seconds(
    config: DistillConfig, size: TransformerSize, card: Card, *, world: int, form: str
) -> tuple[float, float]:
    """Seconds of the critic's and of the student's optimizer step; the latter's state may come from host memory."""
    shards, accumulates = ranks_per_copy(world, config.replicate), config.accumulation_steps(world) > 1
    trained = (size.adapter_parameters(config.lora_rank) if config.lora_rank else size.parameters) / shards
    step = UPDATE_BYTES * trained / card.traffic
    host = place_on_host(form, config.offload, accumulates=accumulates, unsharded=shards == 1)
    state = parameter_bytes(config, form, accumulates=accumulates).optimizer * trained * host.student_state
    average = AVERAGE_BYTES / UPDATE_BYTES * step if config.critic_ema_decay else 0
    return step + average, step + state * card.slowdown / HOST_LINK


def denoising_seconds(forward: float, *, steps: int, gpus: int = 1, compiled: bool = True) -> float:
    """Seconds that the student's steps of one video take, each one pass, on one GPU or shared by several."""
    seconds = steps * forward / gpus
    return (seconds if gpus == 1 else seconds / SHARED_VIDEO_RATE) * (1 if compiled else EAGER_FACTOR)
