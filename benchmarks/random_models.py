"""Random models at their true sizes, or small ones, made on the device: what benchmarks run on."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.device import randomise
from common.condition import Condition, pin
from common.flow import timestep_sigmas, x0_from_velocity
from common.video import LATENT_CHANNELS, VideoSpec, tokens_per_frame
from stage1_encode.generation.condition_encoder import ConditionEncoder
from stage1_encode.models import text_encoder, vae
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.wan import build_meta_transformer, materialize_transformer
from stage2_distill.sampling.student_sampler import StudentSampler
from tests import tiny_models

WORDS = 10_000  # of the stand-in tokenizer: one token a word
PAD, END, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Size:
    """Shapes of both encoders (REFERENCE section 1) and of the pictures."""

    height: int = 704
    width: int = 1280
    base: int = 160  # channels of the VAE's first layer
    blocks: int = 2
    layers: int = 24
    width_text: int = 4096
    heads: int = 64
    hidden: int = 10240
    vocabulary: int = 256384


TRUE = Size()
TINY = Size(64, 96, base=8, blocks=1, layers=2, width_text=64, heads=4, hidden=128, vocabulary=WORDS + 3)
SMALL = Size(
    64, 96, base=8, layers=2, width_text=16, heads=2, hidden=32, vocabulary=512
)  # tests.tiny_models's tokenizer


def autoencoder(size: Size, device: torch.device, decoder: int) -> AutoencoderKLWan:
    """An AutoencoderKLWan in float32, its decoder's first layer `decoder` wide."""
    with device:
        model = AutoencoderKLWan(
            base_dim=size.base, decoder_base_dim=decoder, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4],
            num_res_blocks=size.blocks, temperal_downsample=[False, True, True], is_residual=True,
            in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
            latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def plain(model: AutoencoderKLWan, device: torch.device) -> vae.WanVae:
    """A VAE whose latents need no scaling."""
    mean, std = (torch.full((LATENT_CHANNELS,), value, device=device) for value in (0.0, 1.0))
    mean, std = (rearrange(values, "c -> 1 c 1 1 1") for values in (mean, std))
    return vae.WanVae(model, mean, std)


def umt5(size: Size, device: torch.device) -> UMT5EncoderModel:
    """A UMT5EncoderModel in float32."""
    config = UMT5Config(
        vocab_size=size.vocabulary, d_model=size.width_text, d_kv=size.width_text // size.heads, d_ff=size.hidden,
        num_layers=size.layers, num_heads=size.heads, feed_forward_proj="gated-gelu",
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    with device:
        return UMT5EncoderModel(config).eval().requires_grad_(False)


def random_vae(size: Size, device: torch.device) -> vae.WanVae:
    """The VAE that encodes; its decoder is small."""
    torch.manual_seed(0)
    return plain(autoencoder(size, device, decoder=8), device)


def random_text(size: Size, device: torch.device) -> text_encoder.TextEncoder:
    """A text encoder in float32 and a tokenizer that knows the words w0, w1, ..."""
    torch.manual_seed(1)
    model = text_encoder.fuse_layers(umt5(size, device))
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN} | {f"w{word}": word + 3 for word in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return text_encoder.TextEncoder(model, tokenizer)


def make_models(folder: Path, small: bool, device: torch.device) -> ConditionEncoder:
    """Encoders and decoder of sampling."""
    tiny_models.make_tokenizer(folder / "tokenizer")
    size, dtype = (SMALL, torch.float32) if small else (TRUE, torch.bfloat16)
    prompts = umt5(size, device).to(dtype)
    model = autoencoder(size, device, decoder=8 if small else 256).to(dtype)
    encoder = text_encoder.TextEncoder(prompts, AutoTokenizer.from_pretrained(folder / "tokenizer"))
    frames = vae.make_frame_encoder(plain(fresh(model), device))
    return ConditionEncoder(encoder, plain(model, device), frames, device)


def fresh(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy that shares the weights: the encoder for single frames changes its modules, diffusers needs them."""
    with torch.device("meta"):
        other = AutoencoderKLWan.from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def make_student(spec: VideoSpec, folder: Path, small: bool, device: torch.device) -> StudentSampler:
    """A random network with the true sizes, its blocks compiled."""
    facts = {"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48, "num_layers": 30,
             "num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "freq_dim": 256, "text_dim": 4096,
             "patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}  # fmt: skip
    if small:
        facts |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "text_dim": 16}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(facts))
    dtype = torch.float32 if small else torch.bfloat16
    net = materialize_transformer(
        build_meta_transformer(folder, dtype, ExecutionPlan(compiled=not small)), device
    ).requires_grad_(False)
    draws = torch.Generator(device).manual_seed(0)
    for name, weight in net.named_parameters():
        randomise(name, weight, draws)
    return StudentSampler(net, spec, timestep_sigmas((1000, 750, 500, 250), s=5.0), dtype)


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
