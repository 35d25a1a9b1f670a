"""The VAE and the text encoder of the original Wan2.2 folder: names and settings that its .pth files do not state.

A file of torch.save has only tensors; names are those of Wan-Video/Wan2.2 `wan/modules/vae2_2.py` and `t5.py`, which
are translated to those of diffusers and transformers. Sizes come from the tensors' shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.model_folder import MODEL_REMEDY, collect_tensors, load_pickled
from common.video import LATENT_CHANNELS

# of the VAE, in this order: {pattern of an original name: replacement}
VAE_NAMES = (
    (r"(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"(en|de)coder\.head\.0\.", r"\1coder.norm_out."),
    (r"(en|de)coder\.head\.2\.", r"\1coder.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d+)\.(?:down|up)samples\.\d+\.(resample|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
)
TEXT_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
DIM_MULT = [1, 2, 4, 4]
# Mean and standard deviation of the 48 latent channels (Wan2.2 `vae2_2.py`).
LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]  # fmt: skip
LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]  # fmt: skip


def read_original_tensors(path: Path, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The tensors of a .pth file under translated names; they stay on disk until they are used."""
    tensors = collect_tensors(load_pickled(path, "model"), f"model={path}", MODEL_REMEDY)
    return {translate_name(name, names): value for name, value in tensors.items()}


def translate_name(name: str, names: tuple[tuple[str, str], ...]) -> str:
    """A tensor's name with all patterns replaced."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def check_names(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError that counts and names tensors beyond those of the model, missing ones and wrong shapes."""
    unknown, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    for what, found in (("holds tensors that the model does not have", unknown), ("lacks weights", missing)):
        if found:
            raise ValueError(f"model={path}: {what}: {len(found)}, such as {', '.join(found[:3])}; {MODEL_REMEDY}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, the model needs {list(expected[name].shape)}"
            raise ValueError(f"model={path}: {name} has shape {shapes}; {MODEL_REMEDY}")


def infer_vae_settings(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of AutoencoderKLWan for the tensors of Wan2.2's VAE."""
    try:
        base, channels = tensors["encoder.conv_in.weight"].shape[:2]
        decoder = tensors["decoder.conv_in.weight"].shape[0] // DIM_MULT[-1]
    except KeyError as error:
        raise ValueError(f"model={path}: is not the VAE of Wan2.2 (lacks {error.args[0]}); {MODEL_REMEDY}") from error
    resnets = {name.split(".")[4] for name in tensors if name.startswith("encoder.down_blocks.0.resnets.")}
    return {
        "base_dim": base, "decoder_base_dim": decoder, "z_dim": LATENT_CHANNELS, "dim_mult": DIM_MULT,
        "num_res_blocks": len(resnets), "temperal_downsample": [False, True, True], "is_residual": True,
        "in_channels": channels, "out_channels": channels, "patch_size": 2, "scale_factor_temporal": 4,
        "scale_factor_spatial": 16, "latents_mean": LATENTS_MEAN, "latents_std": LATENTS_STD,
    }  # fmt: skip


def infer_text_settings(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of UMT5EncoderModel for the tensors of the original text encoder."""
    attention = "encoder.block.0.layer.0.SelfAttention."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        buckets, heads = tensors[f"{attention}relative_attention_bias.weight"].shape
        inner = tensors[f"{attention}q.weight"].shape[0]
        hidden = tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"model={path}: is not the UMT5 of Wan (lacks {error.args[0]}); {MODEL_REMEDY}") from error
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block."))
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": inner // heads, "d_ff": hidden, "num_layers": layers,
        "num_heads": heads, "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
