"""Seconds of a training iteration and of a video, from operations and the speeds of a card. Imports no torch."""

from dataclasses import dataclass

from common.video import VideoSpec
from stage2_distill.config import DistillConfig, ranks_per_copy
from stage2_distill.planning.cards import (
    ATTENTION_TFLOPS,
    BANDWIDTH_SHARE,
    DECODE_SECONDS,
    EAGER_FACTOR,
    HOST_LINK,
    OTHER_SECONDS,
    PRODUCT_TFLOPS,
    SHARDED_RATE,
    SHARED_VIDEO_RATE,
    Card,
)
from stage2_distill.planning.memory import parameter_bytes, place_on_host
from stage2_distill.planning.network_size import TransformerSize

BACKWARD_TRAFFIC = 6  # bytes that elementwise kernels move in a backward pass, recomputed block included, per forward's
ADAPTER_FACTOR = 1.06  # a forward pass with adapters
UPDATE_BYTES = 64  # moved per parameter in clipping, step and zeroing: 0.09 s for 5 B on an H200
# Share of a block's products and of its attention that the backward pass computes again; see activation_checkpoint.py.
RECOMPUTED = {"full": (1, 1), "offload": (1, 1), "selective": (1, 0), "selective-mlp": (0.8, 0), "off": (0, 0)}


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one pass of one video on one GPU."""

    forward: float  # without gradient
    gradient: float  # forward and backward


def pass_seconds(size: TransformerSize, spec: VideoSpec, card: Card, kernel: str, config: DistillConfig) -> PassSeconds:
    """Seconds of the passes of compiled blocks."""
    flops = size.pass_flops(spec.num_tokens, config.max_text_tokens)
    # a block reads and writes 19 tensors of the width and two of the feed-forward's (LOG), in bf16
    moved = size.num_layers * spec.num_tokens * 2 * (19 * size.width + 2 * size.ffn_dim)
    traffic = moved / (card.bandwidth * BANDWIDTH_SHARE)
    products = flops.products / (PRODUCT_TFLOPS * card.scale * 1e12)
    ahead, back = (flops.attention / (rate * card.scale * 1e12) for rate in ATTENTION_TFLOPS[kernel])
    forward = products + ahead + traffic
    if config.lora_rank:
        forward *= ADAPTER_FACTOR
    # Gradients of inputs cost a forward's products, those of weights the same; attention's backward 2.5 forwards.
    again_products, again_attention = RECOMPUTED[config.activation_checkpointing]
    backward = products * ((1 if config.lora_rank else 2) + again_products) + 2.5 * back + again_attention * ahead
    return PassSeconds(forward, forward + backward + BACKWARD_TRAFFIC * traffic)


def iteration_seconds(
    config: DistillConfig, size: TransformerSize, card: Card, *, world: int, form: str, kernel: str
) -> float:
    """Seconds of a mean iteration: the critic's update, and the student's in one of `student_update_interval`."""
    one, steps = pass_seconds(size, config.spec, card, kernel, config), len(config.timesteps)
    mean_exit = (steps + 1) / 2  # forward passes of a rollout, the last of which has a gradient for the student
    interval = config.student_update_interval
    critic_rollout = steps / interval if config.rollout_reuse else mean_exit
    scores = 1 + (1 if config.guidance_scale == 1 else 2)  # critic, and the teacher with and without the prompt
    critic = critic_rollout * one.forward + one.gradient
    student = (mean_exit - 1 + scores) * one.forward + one.gradient
    clips = config.accumulation_steps(world) * config.batch_size
    passes = clips * (critic + student / interval) / (SHARDED_RATE if world > 1 else 1)
    if not config.compile:
        passes *= EAGER_FACTOR
    critic_step, student_step = step_seconds(config, size, card, world=world, form=form)
    return passes + critic_step + student_step / interval


def step_seconds(
    config: DistillConfig, size: TransformerSize, card: Card, *, world: int, form: str
) -> tuple[float, float]:
    """Seconds of the critic's and of the student's optimizer step; the latter's state may come from host memory."""
    shards, accumulates = ranks_per_copy(world, config.replicate), config.accumulation_steps(world) > 1
    trained = (size.adapter_parameters(config.lora_rank) if config.lora_rank else size.parameters) / shards
    step = UPDATE_BYTES * trained / (card.bandwidth * BANDWIDTH_SHARE)
    host = place_on_host(form, config.offload, accumulates=accumulates, unsharded=shards == 1)
    state = parameter_bytes(config, form, accumulates=accumulates).optimizer * trained * host.student_state
    return step, step + state / HOST_LINK


def denoising_seconds(
    size: TransformerSize, card: Card, config: DistillConfig, *, steps: int, kernel: str, gpus: int = 1
) -> float:
    """Seconds that the student's steps of one video take, on one GPU or shared by several."""
    seconds = steps * pass_seconds(size, config.spec, card, kernel, config).forward / gpus
    return (seconds if gpus == 1 else seconds / SHARED_VIDEO_RATE) * (1 if config.compile else EAGER_FACTOR)


def video_seconds(
    size: TransformerSize, card: Card, config: DistillConfig, *, steps: int, kernel: str, gpus: int = 1
) -> float:
    """Seconds from prompt and picture to the mp4 file: one GPU decodes."""
    pixels = config.num_frames * config.height * config.width / (121 * 704 * 1280)
    decode = DECODE_SECONDS * pixels / card.scale + OTHER_SECONDS
    return denoising_seconds(size, card, config, steps=steps, kernel=kernel, gpus=gpus) + decode
