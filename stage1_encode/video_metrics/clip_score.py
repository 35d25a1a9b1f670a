"""The door to a CLIP model of transformers that the user names. Shapes: F frames, X Y pixels, B pictures."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

FRAMES = 8  # of each video, evenly spaced
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


@dataclass(frozen=True)
class Clip:
    """The model, its tokenizer and the normalisation of its pictures."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    mean: Tensor  # (3 1 1)
    std: Tensor  # (3 1 1)


def load(folder: str, device: torch.device) -> Clip:
    """Read a CLIP folder; ValueError where it is none, or its weights are not all there as safetensors."""
    facts = Path(folder) / "preprocessor_config.json"
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"clip={folder}: holds no config.json; name the folder of a CLIP model")
    if not list(Path(folder).glob("*.safetensors")):
        raise ValueError(f"clip={folder}: holds no .safetensors weights; a pickled file is not read, convert it")
    stated = json.loads(facts.read_bytes()) if facts.is_file() else {}
    mean, std = (
        rearrange(torch.tensor(values, device=device), "c -> c 1 1")
        for values in (stated.get("image_mean", MEAN), stated.get("image_std", STD))
    )
    model, loading = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"clip={folder}: lacks weights of a CLIP model: {', '.join(missing[:3])}")
    return Clip(model.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder), mean, std)


@torch.no_grad()
def score(clip: Clip, video: numpy.ndarray, prompt: str) -> float:
    """100 x cosine of frames and prompt, mean over 8 frames of a video (F X Y 3) uint8."""
    places = numpy.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().astype(int)
    pictures = rearrange(torch.from_numpy(video[places]).to(clip.mean.device).float(), "b x y c -> b c x y") / 255
    side, short = clip.model.config.vision_config.image_size, min(pictures.shape[2:])
    size = tuple(max(side, round(length * side / short)) for length in pictures.shape[2:])
    whole = functional.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (whole.shape[2] - side) // 2, (whole.shape[3] - side) // 2
    pixels = (whole[:, :, top : top + side, left : left + side] - clip.mean) / clip.std
    most = clip.model.config.text_config.max_position_embeddings
    words = clip.tokenizer([prompt], truncation=True, max_length=most, return_tensors="pt").to(clip.mean.device)
    out = clip.model(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels)
    return 100 * float(functional.cosine_similarity(out.image_embeds, out.text_embeds).mean())
