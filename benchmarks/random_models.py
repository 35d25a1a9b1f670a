"""The two encoders of stage one with random weights, made on the device: at their true size, or tiny."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from common.video import CHANNELS
from stage1_encode import text, vae

WORDS = 10_000  # of the stand-in tokenizer: one token a word
PAD, END, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Size:
    """Shapes of both models (REFERENCE section 1) and of the pictures."""

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


def random_vae(size: Size, device: torch.device) -> vae.Vae:
    """An AutoencoderKLWan in float32."""
    torch.manual_seed(0)
    with device:
        model = AutoencoderKLWan(
            base_dim=size.base, decoder_base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 4, 4],
            num_res_blocks=size.blocks, temperal_downsample=[False, True, True], is_residual=True,
            in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
            latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
        )  # fmt: skip
    mean, std = (torch.full((CHANNELS,), value, device=device) for value in (0.0, 1.0))
    mean, std = (rearrange(values, "c -> 1 c 1 1 1") for values in (mean, std))
    return vae.Vae(model.eval().requires_grad_(False), mean, std)


def random_text(size: Size, device: torch.device) -> text.TextEncoder:
    """A UMT5EncoderModel in float32 and a tokenizer that knows the words w0, w1, ..."""
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=size.vocabulary, d_model=size.width_text, d_kv=size.width_text // size.heads, d_ff=size.hidden,
        num_layers=size.layers, num_heads=size.heads, feed_forward_proj="gated-gelu",
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    with device:
        model = text.fused(UMT5EncoderModel(config))
    vocabulary = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN} | {f"w{word}": word + 3 for word in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return text.TextEncoder(model.eval().requires_grad_(False), tokenizer)
