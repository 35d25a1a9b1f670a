"""The door to `UMT5EncoderModel` and its tokenizer, and the cleaning of prompts. Shapes: L text rows, D text width."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils import logging

from shards.record import TEXT_LENGTH


@dataclass(frozen=True)
class TextEncoder:
    """The text encoder and its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.d_model


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """Read the text encoder of a model folder."""
    logging.disable_progress_bar()
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer)


def clean(prompt: str) -> str:
    """A prompt as the model was trained on it: repaired, HTML unescaped twice, one space between words."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokenize(encoder: TextEncoder, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of clean prompts, cut to 512, the end token included."""
    return encoder.tokenizer(list(prompts), truncation=True, max_length=TEXT_LENGTH).input_ids


def group(tokens: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Places of prompts, shortest first, in batches of at most `budget` tokens, padding included, or of one prompt."""
    batches: list[list[int]] = []
    for place in sorted(range(len(tokens)), key=lambda place: len(tokens[place])):
        if batches and (len(batches[-1]) + 1) * len(tokens[place]) <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


@torch.no_grad()
def embed(encoder: TextEncoder, tokens: Sequence[Sequence[int]], *, budget: int) -> list[Tensor]:
    """Embeddings (L D) bf16 on the CPU, the true rows only, in the order of `tokens`."""
    found: list[Tensor] = [torch.empty(0)] * len(tokens)
    for batch in group(tokens, budget):
        lengths = torch.tensor([len(tokens[place]) for place in batch])
        ids = torch.full((len(batch), int(lengths.max())), encoder.tokenizer.pad_token_id)
        for row, place in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(tokens[place])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = encoder.model.device
        hidden = encoder.model(ids.to(device), mask.to(device)).last_hidden_state.to("cpu", torch.bfloat16)
        for row, place in enumerate(batch):
            found[place] = hidden[row, : lengths[row]].clone()
    return found
