"""The original Wan2.2 folder stands for a diffusers folder: same tensors, and all commands run on it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands.sample import sample_videos
from common.model_folder import locate_model, locate_part
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage1_encode.models.loading import read_text_width
from stage1_encode.models.text_encoder import load_text_encoder
from stage1_encode.models.vae import load_vae
from stage2_distill.config import DistillConfig
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.train import distill
from stage2_distill.weight_files.key_names import to_original

CPU = torch.device("cpu")
FLOAT32 = {"dtype": torch.float32, "device": CPU}
VAE_PARTS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
VAE_PARTS |= {"conv_shortcut": "shortcut"}
TEXT_PARTS = {
    "layer.0.layer_norm": "norm1", "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn", "layer.1.layer_norm": "norm2", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2",
}  # fmt: skip
MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def original_vae_name(name: str) -> str:
    """The name of a tensor of a VAE with one resnet in each block of the encoder, and two in the decoder."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    side, rest = name.split(".", 1)
    way, resnets = ("down", 1) if side == "encoder" else ("up", 2)
    if rest.startswith("mid_block."):
        rest = rest.removeprefix("mid_block.")
        rest = next(rest.replace(one, other, 1) for one, other in MIDDLE.items() if rest.startswith(one))
    rest = re.sub(rf"{way}_blocks\.(\d+)\.resnets\.(\d+)\.", rf"{way}samples.\1.{way}samples.\2.", rest)
    rest = re.sub(rf"{way}_blocks\.(\d+)\.{way}sampler\.", rf"{way}samples.\1.{way}samples.{resnets}.", rest)
    for one, other in (VAE_PARTS | ENDS).items():
        rest = re.sub(rf"(^|\.){one}\.", rf"\1{other}.", rest)
    return f"{side}.{rest}"


def original_text_name(name: str) -> str:
    name = name.replace("shared.", "token_embedding.").replace("encoder.final_layer_norm.", "norm.")
    name = name.replace("encoder.block.", "blocks.")
    for one, other in TEXT_PARTS.items():
        name = name.replace(f".{one}.", f".{other}.")
    return name


def tensors_of(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the layout of Wan-AI/Wan2.2-TI2V-5B."""
    folder = tmp_path_factory.mktemp("original")
    transformer = {to_original(name): tensor for name, tensor in tensors_of(model / "transformer").items()}
    save_file(transformer, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "ti2v", "num_heads": 2, "num_layers": 2}))
    vae = {original_vae_name(name): tensor for name, tensor in tensors_of(model / "vae").items()}
    torch.save(vae, folder / "Wan2.2_VAE.pth")
    text = {original_text_name(name): tensor for name, tensor in tensors_of(model / "text_encoder").items()}
    text.pop("encoder.embed_tokens.weight", None)
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(model / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def test_names_of_the_original_vae() -> None:
    assert original_vae_name("encoder.down_blocks.1.resnets.0.conv_shortcut.bias") == (
        "encoder.downsamples.1.downsamples.0.shortcut.bias"
    )
    assert original_vae_name("decoder.up_blocks.0.upsampler.time_conv.weight") == (
        "decoder.upsamples.0.upsamples.2.time_conv.weight"
    )
    assert original_vae_name("decoder.mid_block.attentions.0.to_qkv.weight") == "decoder.middle.1.to_qkv.weight"


def test_same_tensors(model: Path, original: Path) -> None:
    folder = locate_model(str(original), ("vae", "text_encoder", "tokenizer", "transformer"))
    assert locate_part(folder, "vae").name == "Wan2.2_VAE.pth" and locate_part(folder, "transformer") == folder
    own, other = load_vae(folder, **FLOAT32).model, load_vae(model, **FLOAT32).model
    assert own.config.base_dim == 8 and own.config.latents_mean[0] == -0.2289
    for name, tensor in other.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name
    assert read_text_width(folder) == 16
    own, other = load_text_encoder(folder, **FLOAT32), load_text_encoder(model, **FLOAT32)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(own.model.state_dict()[name], tensor), name
    assert own.tokenizer("A red circle").input_ids == other.tokenizer("A red circle").input_ids


def test_every_command_runs_on_it(original: Path, clips: Path, tmp_path: Path) -> None:
    size = {"num_frames": 9, "height": 64, "width": 96}
    common = {"model": str(original), "device": "cpu"}
    encode(
        EncodeConfig(data=str(clips / "clips.csv"), out=str(tmp_path / "data"), text_dtype="float32", workers=1, **size,
                     **common)
    )  # fmt: skip
    options = {"iterations": 1, "batch_size": 2, "global_batch": 2, "checkpoint_every": 1, "dtype": "float32"}
    distill(DistillConfig(shards=(str(tmp_path / "data"),), out=str(tmp_path / "run"), **options, **size, **common))
    made = sample_videos(
        SampleConfig(checkpoint=str(tmp_path / "run"), out=str(tmp_path / "one.mp4"), prompt="A red circle.", **common)
    )
    assert [path.name for path in made] == ["one.mp4"]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("Wan2.2_VAE.pth", {"conv1.bias": None}, "lacks weights: 1, such as quant_conv.bias"),
        ("Wan2.2_VAE.pth", {"more": torch.ones(1)}, "tensors that the model does not have: 1, such as more"),
        ("Wan2.2_VAE.pth", {"conv1.bias": torch.ones(3)}, r"quant_conv.bias has shape \[3\]"),
        ("Wan2.2_VAE.pth", {"encoder.conv1.weight": None}, "is not the VAE of Wan2.2"),
        ("models_t5_umt5-xxl-enc-bf16.pth", {"norm.weight": None}, "lacks weights: 1, such as encoder.final_layer"),
        ("models_t5_umt5-xxl-enc-bf16.pth", {"token_embedding.weight": None}, "is not the UMT5 of Wan"),
    ],
)
def test_damaged_files_are_named(original: Path, tmp_path: Path, file: str, change: dict, words: str) -> None:
    folder = shutil.copytree(original, tmp_path / "copy")
    tensors = torch.load(folder / file, weights_only=True) | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)
    with pytest.raises(ValueError, match=words):
        (load_vae if "VAE" in file else load_text_encoder)(folder, **FLOAT32)
