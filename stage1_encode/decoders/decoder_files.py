"""Reads a file of decoder weights and says what it is; a file for another VAE is refused by the name of that VAE.

Key names: the TAEHV family, see `tiny_network`; decoders of the full one's shape under diffusers' names or those of
Wan-Video/Wan2.2 `wan/modules/vae2_2.py`. Both kinds of MG-LightVAE (Matrix-Game 3.0, half and a quarter of the
channels) have diffusers' names within `state_dict.gen_model` (ModelTC/LightX2V, vae_2_2.py at
f8aee98b5462cca8d7288888146ebd95592bf266).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import check_no_pipe
from common.model_folder import collect_tensors, load_pickled
from common.video import LATENT_CHANNELS
from stage1_encode.decoders.tiny_network import TinyLayout, keep_last_frames, read_layout
from stage1_encode.models.original_models import DIM_MULT, VAE_NAMES, translate_name

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "gen_model", "generator", "model")  # dicts within a checkpoint, around the tensors
READ_REMEDY = "download or copy it again"
ANY_DECODER = "give full, or a decoder for the VAE of Wan2.2-TI2V-5B such as taew2_2.safetensors"
# Whose VAEs have so many latent channels.
OTHER_VAES = {16: "Wan2.1 or HunyuanVideo", 24: "MiniMax H3", 32: "HunyuanVideo 1.5", 128: "LTX-Video 2"}
PATCH = 2  # pixels of an output cell, in height and in width
FULL_PARTS = ("decoder.", "post_quant_conv.")


@dataclass(frozen=True)
class DecoderFile:
    """The tensors of a decoder for this VAE."""

    path: Path
    tensors: Mapping[str, Tensor]
    layout: TinyLayout | None  # of a tiny decoder; None = the full one's shape

    @property
    def width(self) -> int:
        """The option `decoder_base_dim` of a decoder of the full one's shape."""
        return self.tensors["decoder.conv_in.weight"].shape[0] // DIM_MULT[-1]

    @property
    def blocks(self) -> int:
        """The option `num_res_blocks` of a decoder of the full one's shape: a level has one block more."""
        return len({name.split(".")[4] for name in self.tensors if name.startswith("decoder.up_blocks.0.resnets.")}) - 1

    def check_tensors(self, expected: Mapping[str, Tensor]) -> None:
        """Raise ValueError that names a tensor that is missing, surplus, misshapen or not finite."""
        missing, unknown = expected.keys() - self.tensors.keys(), self.tensors.keys() - expected.keys()
        for what, names in (("lacks weights", missing), ("holds weights that its kind does not have", unknown)):
            if names:
                listed = f"{len(names)}, such as {', '.join(sorted(names)[:3])}"
                raise ValueError(f"decoder={self.path}: {what}: {listed}; {READ_REMEDY}")
        for name, tensor in self.tensors.items():
            if tensor.shape != expected[name].shape:
                shapes = f"{list(tensor.shape)}, needed is {list(expected[name].shape)}"
                raise ValueError(f"decoder={self.path}: {name} has shape {shapes}; {READ_REMEDY}")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                remedy = "give float16, bfloat16 or float32 weights"
                raise ValueError(f"decoder={self.path}: {name} is stored as {tensor.dtype}; {remedy}")
            if not tensor.isfinite().all():
                raise ValueError(f"decoder={self.path}: {name} holds values that are not finite; {READ_REMEDY}")


def open_decoder_file(path: Path) -> DecoderFile:
    """Read and recognize a file of decoder weights; ValueError if it is none for the VAE of Wan2.2-TI2V-5B."""
    tensors = read_tensors(path)
    layout = read_layout(tensors)
    if layout is not None:
        check_vae(path, layout.latent_channels, layout.outputs)
        return DecoderFile(path, keep_last_frames(tensors, layout), layout)
    tensors = {translate_name(name, VAE_NAMES): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(FULL_PARTS)}
    entry, last = (tensors.get(f"decoder.{name}.weight") for name in ("conv_in", "conv_out"))
    if entry is None or last is None or entry.dim() != 5 or last.dim() != 5 or len(entry) < DIM_MULT[-1]:
        raise ValueError(f"decoder={path}: is not a decoder that is known here; {ANY_DECODER}")
    check_vae(path, entry.shape[1], last.shape[0])
    return DecoderFile(path, tensors, None)


def check_vae(path: Path, channels: int, outputs: int) -> None:
    """Raise ValueError if a decoder is for a VAE with other latents or another patch size."""
    if channels != LATENT_CHANNELS:
        name = OTHER_VAES.get(channels, "another model")
        counts = f"{channels} latent channels, not {LATENT_CHANNELS}"
        raise ValueError(f"decoder={path}: is for the VAE of {name} ({counts}); {ANY_DECODER}")
    if outputs != 3 * PATCH**2:
        raise ValueError(f"decoder={path}: has {outputs} output channels, not {3 * PATCH**2}; {ANY_DECODER}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of torch.save; nothing in it is executed."""
    try:
        check_no_pipe("decoder", path)
        if path.suffix in PICKLED_SUFFIXES:
            return unwrap_tensors(path, load_pickled(path, "decoder"))
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"decoder={path}: no such file; {ANY_DECODER}") from error
    except IsADirectoryError as error:
        raise ValueError(f"decoder={path}: is a folder; {ANY_DECODER}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"decoder={path}: cannot be read ({error}); {READ_REMEDY}") from error


def unwrap_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may lie within dicts of usual names."""
    for _ in WRAPPERS:  # a dict may lie within itself
        inner = [content[name] for name in WRAPPERS if name in content] if isinstance(content, dict) else []
        content = inner[0] if inner else content
    return collect_tensors(content, f"decoder={path}", "save the decoder's state_dict alone")
