"""The CLIP score, by a CLIP model that the user provides. Shapes: F frames, X Y pixels, B pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from common.files import read_json
from common.model_folder import check_weight_files, report_load_errors

PREPROCESSOR_FILE = "preprocessor_config.json"
CLIP_FRAMES = 8  # scored per video, evenly spaced
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI


@dataclass(frozen=True)
class Preprocessor:
    """The normalization of a CLIP model's pictures, as in preprocessor_config.json."""

    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class ClipScorer:
    """The model, its tokenizer and the normalization of its pictures."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    mean: Tensor  # (3 1 1)
    std: Tensor  # (3 1 1)


def load_clip(folder: str, device: torch.device) -> ClipScorer:
    """Load a CLIP folder; ValueError if it is not one, or if its weights are incomplete or not safetensors."""
    preprocessor_file = Path(folder) / PREPROCESSOR_FILE
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"clip_model={folder}: holds no config.json; give the folder of a CLIP model")
    if not list(Path(folder).glob("*.safetensors")):
        raise ValueError(f"clip_model={folder}: holds no .safetensors weights; convert the pickled ones")
    check_weight_files(Path(folder), option="clip_model")
    preprocessor = read_json(preprocessor_file, Preprocessor) if preprocessor_file.is_file() else Preprocessor()
    statistics = torch.tensor((preprocessor.image_mean, preprocessor.image_std), device=device)
    mean, std = rearrange(statistics, "s c -> s c 1 1")
    with report_load_errors(Path(folder), option="clip_model"):
        # Without `attn_implementation`, config.json may name code of the hub for it.
        model, loading_info = CLIPModel.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    missing = sorted(loading_info["missing_keys"])  # transformers would draw them at random
    if missing:
        raise ValueError(f"clip_model={folder}: lacks weights ({', '.join(missing[:3])}); copy the folder again")
    return ClipScorer(model.to(device).eval().requires_grad_(False), tokenizer, mean, std)


@torch.no_grad()
def clip_score(clip: ClipScorer, video: numpy.ndarray, prompt: str) -> float:
    """Return 100 x cosine similarity of frames and prompt, averaged over 8 frames of a video (F X Y 3) uint8."""
    frame_indices = numpy.linspace(0, len(video) - 1, min(CLIP_FRAMES, len(video))).round().astype(int)
    device = clip.mean.device
    pictures = rearrange(torch.from_numpy(video[frame_indices]).to(device).float(), "b x y c -> b c x y") / 255
    # CLIP's preprocessing: the shorter side to the crop size, then a center crop
    crop_size, short = clip.model.config.vision_config.image_size, min(pictures.shape[2:])
    size = tuple(max(crop_size, round(length * crop_size / short)) for length in pictures.shape[2:])
    resized = functional.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized.shape[2] - crop_size) // 2, (resized.shape[3] - crop_size) // 2
    pixels = (resized[:, :, top : top + crop_size, left : left + crop_size] - clip.mean) / clip.std
    max_tokens = clip.model.config.text_config.max_position_embeddings
    text = clip.tokenizer([prompt], truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
    output = clip.model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pixels)
    return 100 * float(functional.cosine_similarity(output.image_embeds, output.text_embeds).mean())
