"""Random models of the true sizes, or small ones, made on the device: what benchmarks run on."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from common.condition import Condition, pin
from common.flow import ladder, x0_from_velocity
from common.video import VideoSpec, tokens_per_frame
from stage1_encode import vae
from stage1_encode.conditions import Conditioner
from stage1_encode.text import TextEncoder
from stage2_distill.network import Plan
from stage2_distill.sample import Student
from stage2_distill.wan import materialise, skeleton
from tests import tiny

LARGE = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 512}


def randomise(module: nn.Module) -> None:
    """Matrices small, vectors as they are at the start of a training."""
    draws = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for name, value in module.named_parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.02, generator=draws)
        else:
            value.data.fill_(float("norm" in name and name.endswith("weight")))


def make_student(spec: VideoSpec, folder: Path, small: bool, device: torch.device) -> Student:
    """A random network with the true sizes, its blocks compiled."""
    facts = {"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48, "num_layers": 30,
             "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "freq_dim": 256, "text_dim": 4096,
             "patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}  # fmt: skip
    if small:
        facts |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "text_dim": 16}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(facts))
    dtype = torch.float32 if small else torch.bfloat16
    net = materialise(skeleton(folder, dtype, Plan(compiled=not small)), device).requires_grad_(False)
    randomise(net)
    return Student(net, spec, ladder((1000, 750, 500, 250), s=5.0), dtype)


def make_models(folder: Path, small: bool, device: torch.device, kernels: bool) -> Conditioner:
    """Random encoders and decoder with the true sizes."""
    tiny.make_tokenizer(folder / "tokenizer")
    dtype = torch.float32 if small else torch.bfloat16
    sizes = SMALL if small else LARGE
    with torch.device(device):
        prompts = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu", pad_token_id=0)).to(dtype).eval()
        model = AutoencoderKLWan(
            base_dim=8 if small else 160, decoder_base_dim=8 if small else 256, z_dim=48, dim_mult=[1, 2, 4, 4],
            num_res_blocks=2, is_residual=True, temperal_downsample=[False, True, True], in_channels=12,
            out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
            latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        ).to(dtype).eval().requires_grad_(False)  # fmt: skip
    shift, spread = torch.zeros(1, 48, 1, 1, 1, device=device), torch.ones(1, 48, 1, 1, 1, device=device)
    whole = vae.Vae(model, shift, spread, kernels)
    text = TextEncoder(prompts.requires_grad_(False), AutoTokenizer.from_pretrained(folder / "tokenizer"))
    return Conditioner(text, whole, vae.frame_encoder(vae.Vae(fresh(model), shift, spread)), device)


def fresh(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy that shares the weights: the encoder for single frames changes its modules, diffusers needs them."""
    with torch.device("meta"):
        other = AutoencoderKLWan.from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def plain_denoise(net: WanTransformer3DModel, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """diffusers' own forward with one time a token, eager."""
    x_t, dtype = pin(x_t.float(), condition), next(net.parameters()).dtype
    frame = tokens_per_frame(*x_t.shape[3:])
    times = 1000 * sigma[:, None].repeat(1, frame * x_t.shape[2])
    if condition.first_frame is not None:
        times[:, :frame] = 0
    (velocity,) = net(
        hidden_states=x_t.to(dtype), timestep=times,
        encoder_hidden_states=condition.text.to(dtype), return_dict=False,
    )  # fmt: skip
    return pin(x0_from_velocity(x_t, velocity.float(), sigma.float()), condition)
