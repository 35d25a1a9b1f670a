"""Encoders, decoder and student with random weights at their true sizes, or small ones, made on the device."""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.device import TINY as TINY_NETWORK
from benchmarks.device import TRUE as TRUE_NETWORK
from benchmarks.device import Case, meta_network, randomize_weights
from common.condition import Condition, pin
from common.flow import timestep_sigmas, x0_from_velocity
from common.video import LATENT_CHANNELS, VideoSpec, tokens_per_frame
from stage1_encode.decoders.load_decoder import TinyDecoder
from stage1_encode.decoders.tiny_network import TinyLayout, TinyNetwork
from stage1_encode.generation.condition_encoder import ConditionEncoder
from stage1_encode.models import text_encoder, vae
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.wan import materialize_transformer
from stage2_distill.sampling.student_sampler import StudentSampler

WORDS = 10_000  # of the word tokenizer: one token per word
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1 and 2


@dataclass(frozen=True)
class Size:
    """Shapes of both encoders, as in Wan2.2-TI2V-5B, and of the pictures."""

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
SMALL = Size(64, 96, base=8, layers=2, width_text=16, heads=2, hidden=32, vocabulary=512)


def autoencoder(size: Size, device: torch.device, decoder: int) -> AutoencoderKLWan:
    """Return an AutoencoderKLWan in float32 whose decoder's first layer has `decoder` channels."""
    with device:
        model = AutoencoderKLWan(
            base_dim=size.base, decoder_base_dim=decoder, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4],
            num_res_blocks=size.blocks, temperal_downsample=[False, True, True], is_residual=True,
            in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
            latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def unscaled_vae(model: AutoencoderKLWan, device: torch.device) -> vae.WanVae:
    """Return a VAE whose latents have mean 0 and standard deviation 1."""
    mean, std = (torch.full((LATENT_CHANNELS,), value, device=device) for value in (0.0, 1.0))
    mean, std = (rearrange(values, "c -> 1 c 1 1 1") for values in (mean, std))
    return vae.WanVae(model, mean, std)


def tiny_vae(base: vae.WanVae, *, is_wide: bool = False) -> vae.WanVae:
    """Return a VAE with a random decoder of the TAEHV family, at the widths of its published weights."""
    widths = (512, 256, 128, 64) if is_wide else (256, 128, 64, 64)
    with base.device:
        network = TinyNetwork(TinyLayout(LATENT_CHANNELS, 12, widths, is_wide)).to(base.model.dtype)
    network.prepare_inference()
    return replace(base, other_decoder=TinyDecoder(network, base.mean, base.std, base.model.dtype, base.chunk_frames))


def umt5(size: Size, device: torch.device) -> UMT5EncoderModel:
    """Return a UMT5EncoderModel in float32."""
    config = UMT5Config(
        vocab_size=size.vocabulary, d_model=size.width_text, d_kv=size.width_text // size.heads, d_ff=size.hidden,
        num_layers=size.layers, num_heads=size.heads, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with device:
        return UMT5EncoderModel(config).eval().requires_grad_(False)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that ends each prompt with `</s>`."""
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, end, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ..."""
    words = (*SPECIAL_TOKENS, *(f"w{word}" for word in range(WORDS)))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(tokenizer)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters, bytes and a few words, of the same kind as UMT5's."""
    words = [("▁", -5.0), *((f"▁{word}", -6.0) for word in ("A", "and", "the", "then", "moves", "right", "left"))]
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    vocabulary += [(chr(code), -8.0) for code in range(33, 127)] + words
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrap_tokenizer(tokenizer)


def random_vae(size: Size, device: torch.device) -> vae.WanVae:
    """Return a VAE to encode with; its decoder is small."""
    torch.manual_seed(0)
    return unscaled_vae(autoencoder(size, device, decoder=8), device)


def random_text_encoder(size: Size, device: torch.device) -> text_encoder.TextEncoder:
    """Return a text encoder in float32 with the word tokenizer."""
    torch.manual_seed(1)
    return text_encoder.TextEncoder(text_encoder.fuse_layers(umt5(size, device)), word_tokenizer())


def sampling_autoencoder(small: bool, device: torch.device) -> AutoencoderKLWan:
    """Return the VAE of sampling, the same on every rank."""
    torch.manual_seed(0)
    size, dtype = (SMALL, torch.float32) if small else (TRUE, torch.bfloat16)
    return autoencoder(size, device, decoder=8 if small else 256).to(dtype)


def sampling_models(small: bool, device: torch.device) -> ConditionEncoder:
    """Return the encoders and the decoder of sampling."""
    model = sampling_autoencoder(small, device)
    text_model = umt5(SMALL if small else TRUE, device).to(model.dtype)
    encoder = text_encoder.TextEncoder(text_model, letter_tokenizer())
    frame_encoder = vae.make_frame_encoder(unscaled_vae(share_weights(model), device))
    return ConditionEncoder(encoder, unscaled_vae(model, device), frame_encoder, device)


def share_weights(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """Return a second model with the same weights: the frame encoder changes its modules, and diffusers needs them."""
    with torch.device("meta"):
        other = AutoencoderKLWan.from_config(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def random_student(spec: VideoSpec, small: bool, device: torch.device) -> StudentSampler:
    """Return a 4-step sampler of a random network, its blocks compiled unless it is small."""
    dtype = torch.float32 if small else torch.bfloat16
    case = Case(spec, device, dtype, TINY_NETWORK if small else TRUE_NETWORK)
    net = materialize_transformer(meta_network(case, ExecutionPlan(compiled=not small), dtype), device)
    randomize_weights(net.requires_grad_(False).named_parameters(), device)
    return StudentSampler(net, spec, timestep_sigmas((1000, 750, 500, 250), s=5.0), dtype)


def diffusers_denoise(net: WanTransformer3DModel, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Predict x0 by diffusers' own forward pass, with one time per token."""
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
