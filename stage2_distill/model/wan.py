"""Wan2.2-TI2V's transformer: built and loaded from a model folder, and used as a `Denoiser`.

Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from common.condition import Condition, Denoiser, concat_conditions, frame_sigma, free_mean, pin
from common.flow import per_sample, x0_from_velocity
from common.model_folder import locate_part, report_load_errors
from common.video import LATENT_CHANNELS
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer, convert_transformer
from stage2_distill.model.weight_loading import read_weights
from stage2_distill.weight_files.lora_files import LoraFile
from stage2_distill.weight_files.transformer_config import read_transformer_config

TIME_SCALE = 1000  # the network's time is 1000 sigma


def build_meta_transformer(model: Path, dtype: torch.dtype, plan: ExecutionPlan | None = None) -> WanTransformer:
    """The transformer of a located model on the meta device, in `dtype`; ValueError if it is not Wan2.2-TI2V's."""
    path = locate_part(model, "transformer")
    config = read_transformer_config(path)
    with report_load_errors(path), torch.device("meta"):
        net = WanTransformer3DModel.from_config(config)
    if net.config.in_channels != LATENT_CHANNELS or net.config.out_channels != LATENT_CHANNELS:
        channels = f"{net.config.in_channels} channels, Wan2.2-TI2V-5B has {LATENT_CHANNELS}"
        raise ValueError(f"model={model}: its transformer has {channels}; give that one")
    return cast_parameters(convert_transformer(net, plan), dtype).eval()


def materialize_transformer(net: WanTransformer, device: torch.device) -> WanTransformer:
    """Allocate a meta transformer, sharded or not, on `device`; weights stay undefined."""
    net.to_empty(device=device)
    rope = net.rope  # its tables are in no file, so they are computed again
    net.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return net


def load_transformer(
    model: Path, dtype: torch.dtype, plan: ExecutionPlan | None = None, loras: Sequence[LoraFile] = ()
) -> WanTransformer:
    """Read the transformer of a located model on the CPU, parameters in `dtype`, rope tables in float32."""
    net = materialize_transformer(build_meta_transformer(model, dtype, plan), torch.device("cpu"))
    read_weights(locate_part(model, "transformer"), dict(net.named_parameters()), loras=loras)
    return net


def cast_parameters(net: WanTransformer, dtype: torch.dtype) -> WanTransformer:
    """Cast the parameters in place, not the buffers."""
    for parameter in net.parameters():  # `net.to(dtype)` would round the rope tables
        parameter.data = parameter.data.to(dtype)
    return net


def denoise(net: nn.Module, x_t: Tensor, sigma: Tensor, condition: Condition, *, dtype: torch.dtype) -> Tensor:
    """Predict x0 (B C T H W) float32 from x_t at sigma (B); the network computes in `dtype`, the rest in float32."""
    x_t = pin(x_t.float(), condition)  # a given first frame is never noised
    times = TIME_SCALE * frame_sigma(sigma.float(), condition)  # float32: bf16 would round 937.5 to 936
    text = condition.text.to(dtype)
    (velocity,) = net(hidden_states=x_t.to(dtype), timestep=times, encoder_hidden_states=text, return_dict=False)
    return pin(x0_from_velocity(x_t, velocity.float(), sigma.float()), condition)


def make_denoiser(net: nn.Module, dtype: torch.dtype) -> Denoiser:
    """The network as a function to x0."""
    return partial(denoise, net, dtype=dtype)


def guided(denoiser: Denoiser, *, negative_text: Tensor, scale: float, rescale: float = 0.0) -> Denoiser:
    """Classifier-free guidance, uncond + scale (cond - uncond), both branches in one batch (arXiv 2207.12598).

    negative_text: (L D), padded like the batch's text. Scale 1 returns the denoiser itself.
    """
    if scale == 1:
        return denoiser
    denoise_pair = guided_pair(denoiser, negative_text=negative_text, scale=scale, rescale=rescale)
    return lambda x_t, sigma, condition: denoise_pair(x_t, sigma, condition)[0]


def guided_pair(
    denoiser: Denoiser, *, negative_text: Tensor, scale: float, rescale: float = 0.0
) -> Callable[[Tensor, Tensor, Condition], tuple[Tensor, Tensor]]:
    """`guided`, as a function to x0 with guidance and x0 without."""

    def denoise_pair(x_t: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        negative = negative_text.to(condition.text).expand_as(condition.text)
        both = concat_conditions([condition, replace(condition, text=negative)])
        cond, uncond = denoiser(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both).chunk(2)
        result = uncond + scale * (cond - uncond)
        return rescale_guided(result, cond, condition, share=rescale) if rescale else result, cond

    return denoise_pair


def rescale_guided(x0: Tensor, cond: Tensor, condition: Condition, *, share: float) -> Tensor:
    """x0 (B C T H W) with guidance, mixed with itself at the deviation that it has without guidance.

    share * x0 * std(cond) / std(x0) + (1 - share) * x0, the deviations per sample over the free frames: guidance raises
    the contrast, and this takes a share of that back (arXiv 2305.08891, eq. 14 to 16, there on the network's output).
    """
    factor = per_sample(free_deviation(cond, condition) / free_deviation(x0, condition))
    return pin((1 - share + share * factor) * x0, condition)  # a given frame stays as it is


def free_deviation(x0: Tensor, condition: Condition) -> Tensor:
    """Standard deviation (B) of x0 (B C T H W) over its free frames."""
    return free_mean((x0 - per_sample(free_mean(x0, condition))) ** 2, condition).sqrt()
