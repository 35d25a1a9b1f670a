"""A tiny random model in the hub's folder layout, and small H.264 clips: what every test runs on."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from stage1_encode.decoders.tiny_network import TinyLayout

TEXT_DIM = 16  # D
PROMPTS = (
    "A red circle moves to the right.",
    "A blue square falls &amp; bounces.",
    "  A green   triangle turns around, slowly, in front of a grey wall. ",
    "Yellow",
    "A white circle rises: café, naïve, 光.",
    "A black square moves left and then right and then left again.",
)


def make_transformer(folder: Path) -> None:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=48,
        out_channels=48,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    model.save_pretrained(folder)


def make_vae(folder: Path) -> None:
    channels = torch.arange(48, dtype=torch.float64)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
        latents_mean=(0.02 * torch.sin(channels)).tolist(),
        latents_std=(0.1 + 0.05 * torch.cos(channels)).tolist(),
    )
    vae.save_pretrained(folder)


def make_tokenizer(folder: Path) -> int:
    """Write a T5-like tokenizer (`</s>` ends a prompt, pad is 0, unknown characters become bytes); its size."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    bytes_ = [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    words = [("▁", -5.0), *((f"▁{word}", -6.0) for word in ("A", "and", "the", "then", "moves", "right", "left"))]
    vocabulary = special + bytes_ + letters + words
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def make_text_encoder(folder: Path, vocab_size: int) -> None:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    UMT5EncoderModel(config).save_pretrained(folder)


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a random model with the classes of Wan2.2-TI2V-5B into `folder` and return it; one seed, one model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_transformer(folder / "transformer")
        make_vae(folder / "vae")
        make_text_encoder(folder / "text_encoder", make_tokenizer(folder / "tokenizer"))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    index = {"_class_name": "WanPipeline", "expand_timesteps": True, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def lose_weight(folder: Path, key: str) -> None:
    """Take one weight out of a part of a model."""
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})


def picture(height: int, width: int, *, seed: int, shift: int = 0) -> numpy.ndarray:
    """A picture (H W 3) uint8 of two gradients and a bright square whose place depends on `shift`."""
    draw = numpy.random.default_rng(seed)
    colour, corner = draw.integers(64, 255, 3), draw.integers(0, min(height, width) // 2, 2)
    y, x = numpy.mgrid[:height, :width]
    image = numpy.stack([x * 160 / width, y * 160 / height, 40 + 0 * x], axis=-1)
    size, left = max(4, height // 4), (corner[1] + shift) % max(1, width - height // 4)
    image[corner[0] : corner[0] + size, left : left + size] = colour
    return image.astype(numpy.uint8)


def make_clip(path: Path, *, seed: int, frames: int = 17, height: int = 64, width: int = 96) -> Path:
    """Write a short H.264 clip with a moving square and return its path."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "18", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            image = picture(height, width, seed=seed, shift=2 * index)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


def write_csv(path: Path, rows: Sequence[Sequence[object]], columns: Sequence[str] = ("video", "prompt")) -> Path:
    """Write a CSV and return its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def make_clips(folder: Path, *, count: int = 6, height: int = 64, width: int = 96) -> Path:
    """Write `count` clips and `clips.csv` into `folder` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"clip-{index}.mp4" for index in range(count)]
    for index, name in enumerate(names):
        make_clip(folder / name, seed=index, height=height, width=width)
    write_csv(folder / "clips.csv", [(name, PROMPTS[i % len(PROMPTS)]) for i, name in enumerate(names)])
    return folder


def random_tiny_decoder(layout: TinyLayout, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a decoder of the TAEHV family, under the names that its published files have."""
    first, second, third, last = layout.widths
    sizes = [first, second, third]
    shapes: dict[str, tuple[int, ...]] = {"22.weight": (layout.outputs, last, 3, 3), "22.bias": (layout.outputs,)}
    shapes |= {"0.weight" if layout.is_wide else "1.weight": (first, layout.latent_channels, 1, 1)}
    for start, width, after, growth in zip((1, 8, 15), sizes, layout.widths[1:], (1, 2, 2), strict=True):
        if layout.is_wide:
            shapes |= {f"{start + 3}.weight": (4 * after, width, 3, 3), f"{start + 3}.bias": (4 * after,)}
            shapes |= {f"{start + 6}.conv.weight": (growth * after, after, 1, 1)}
            for n in range(start, start + 3):
                shapes |= {
                    f"{n}.conv.0.weight": (2 * width, 1, 7, 7),
                    f"{n}.conv.1.weight": (4 * width, 2 * width, 1, 1),
                }
                shapes |= {f"{n}.conv.1.bias": (4 * width,), f"{n}.conv.3.weight": (width, 4 * width, 1, 1)}
    for start, width, after, growth in zip((3, 9, 15), sizes, layout.widths[1:], (1, 2, 2), strict=True):
        if not layout.is_wide:
            shapes |= {"1.weight": (first, layout.latent_channels, 3, 3), "1.bias": (first,)}
            shapes |= {f"{start + 4}.conv.weight": (growth * width, width, 1, 1)}
            shapes |= {f"{start + 5}.weight": (after, width, 3, 3)}
            for n in range(start, start + 3):
                shapes |= {f"{n}.conv.0.weight": (width, 2 * width, 3, 3), f"{n}.conv.2.weight": (width, width, 3, 3)}
                shapes |= {f"{n}.conv.4.weight": (width, width, 3, 3)}
                shapes |= {f"{n}.conv.{k}.bias": (width,) for k in (0, 2, 4)}
    generator = torch.Generator().manual_seed(seed)
    return {
        f"decoder.{name}": 0.1 + torch.rand(shape, generator=generator) - 0.5
        if len(shape) == 1
        else torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        for name, shape in shapes.items()
    }
