"""Says what a file is that is not the transformer of a Wan2.2-TI2V, in one line."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from common.files import open_file
from common.video import LATENT_CHANNELS

NEEDED = "this project needs Wan2.2-TI2V-5B"
# The first bytes of files that carry no weights in a form that is read here.
MAGIC_BYTES = {
    b"GGUF": "is a GGUF file, whose weights are rounded to a few bits; give the bf16 or fp16 file",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git lfs pull, or download the file",
    b"<": "is a web page, not weights; download the file itself",
    b"{": "is a JSON file, not weights; give the .safetensors or .pt file",
    b"\x80": "is a pickle in the format before torch 1.6; load and save it again with a newer torch",
    b"\x1f\x8b": "is a compressed archive; unpack it and give the file inside",
    b"7z": "is a compressed archive; unpack it and give the file inside",
}
# Parts of tensor names that only other models and files have.
NAME_MARKS = {
    "vace_": "a Wan VACE model",
    "face_adapter": "Wan2.2-Animate-14B",
    "motion_encoder": "Wan2.2-Animate-14B",
    "casual_audio_encoder": "Wan2.2-S2V-14B",
    "audio_injector": "Wan2.2-S2V-14B",
    "control_adapter": "a Wan2.2-Fun-Control model",
    "img_emb.": "an image-to-video model of Wan2.1 (I2V-14B)",
    "image_embedder.": "an image-to-video model of Wan2.1 (I2V-14B)",
    "decoder.upsamples": "a VAE",
    "decoder.up_blocks": "a VAE",
    "encoder.block.": "a T5 text encoder",
    "token_embedding": "a T5 text encoder",
    "double_blocks": "a Flux or Hunyuan model",
    "joint_blocks": "a Stable Diffusion 3 model",
    "input_blocks": "a Stable Diffusion model",
    "transformer_blocks": "another model than Wan",
}
LORA_MARKS = (".lora_", "lora_unet_", ".lora.", "hada_w", "lokr_", "_lora.")
OPTIMIZER_MARKS = ("exp_avg", "param_groups", "optimizer.")
# (channels of the input, width) of the models of Wan with 16 latent channels
OTHER_SIZES = {
    (16, 1536): "Wan2.1-T2V-1.3B",
    (16, 5120): "a 14B text-to-video model (Wan2.1-T2V-14B or Wan2.2-T2V-A14B)",
    (36, 5120): "Wan2.2-I2V-A14B",
    (36, 1536): "a Wan2.1-Fun model of 1.3B",
}


def refuse_other_file(path: Path) -> None:
    """Raise ValueError if the first bytes of a file say that it is not read here."""
    with open_file(path) as file:
        start = file.read(32)
    if not start:
        raise ValueError(f"{path}: is empty; download or copy it again")
    if start[8:9] == b"{":  # safetensors: a length, of which the first byte may be anything, and a JSON header
        return
    for magic, description in MAGIC_BYTES.items():
        if start.lstrip().startswith(magic):
            raise ValueError(f"{path}: {description}")


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a LoRA file."""
    return any(mark in name for name in names for mark in LORA_MARKS)


def refuse_other_model(path: Path, shapes: Mapping[str, Iterable[int]]) -> None:
    """Raise ValueError if the names and shapes of a file's tensors are those of another model."""
    names = list(shapes)
    if not names:
        raise ValueError(f"{path}: holds no tensors; {NEEDED}")
    if is_lora(names):
        raise ValueError(f"{path}: is a LoRA file, not a model; give it as --base-lora, beside --model")
    for mark, description in NAME_MARKS.items():
        if any(mark in name for name in names):
            raise ValueError(f"{path}: is {description}; {NEEDED}")
    if any(mark in name for name in names for mark in OPTIMIZER_MARKS):
        raise ValueError(f"{path}: holds the state of an optimizer, not a model; give the model's file")
    patches = list(shapes.get("patch_embedding.weight", ()))
    if len(patches) != 5:
        first = ", ".join(sorted(names)[:3])
        raise ValueError(f"{path}: its {len(names)} tensors are not those of a Wan transformer ({first}); {NEEDED}")
    width, channels = patches[:2]
    if channels != LATENT_CHANNELS:
        name = OTHER_SIZES.get((channels, width), f"a Wan model with {channels} channels and width {width}")
        raise ValueError(f"{path}: is {name}; {NEEDED}, which has {LATENT_CHANNELS} channels")
