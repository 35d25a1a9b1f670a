"""The only loader of `UMT5EncoderModel` and its tokenizer; prompt cleaning and embedding.

Shapes: B prompts, L text rows, D text width.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel
from transformers.activations import NewGELUActivation
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm
from transformers.utils import logging

from common.device import copy_async
from common.model_folder import locate_part, report_load_errors
from common.video import TEXT_LENGTH
from stage1_encode.models.loading import check_missing_weights
from stage1_encode.models.original_models import TEXT_NAMES, check_names, infer_text_settings, read_original_tensors


@dataclass(frozen=True)
class TextEncoder:
    """The text encoder and its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase


def load_text_encoder(folder: Path, *, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """Load the text encoder of a model folder; ValueError if it is broken or not a UMT5."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # missing weights are reported by `check_missing_weights`
    weights_folder, tokenizer_folder = locate_part(folder, "text_encoder"), locate_part(folder, "tokenizer")
    if weights_folder.is_file():
        model = load_original_text_encoder(weights_folder, dtype)
    else:
        with report_load_errors(weights_folder):
            # Without `attn_implementation`, config.json may name code of the hub for it.
            model, loading_info = UMT5EncoderModel.from_pretrained(
                weights_folder, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False,
                attn_implementation="sdpa",
            )  # fmt: skip
        check_missing_weights(weights_folder, loading_info)
    with report_load_errors(tokenizer_folder):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    return TextEncoder(fuse_layers(model).to(device).eval().requires_grad_(False), tokenizer)


def load_original_text_encoder(path: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """Read the original models_t5_umt5-xxl-enc-bf16.pth on the CPU."""
    tensors = read_original_tensors(path, TEXT_NAMES)
    config = UMT5Config(**infer_text_settings(path, tensors))
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]  # one tensor under two names
    check_names(path, tensors, model.state_dict())
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    model.tie_weights()
    return model


def fuse_layers(model: UMT5EncoderModel) -> UMT5EncoderModel:
    """Replace norms and activations, in place, by fused ones: one pass over memory instead of seven or eight."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, UMT5LayerNorm):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, elementwise_affine=False)
            norm.weight = module.weight  # the same parameter, no copy
            setattr(model.get_submodule(parent), child, norm)
        elif isinstance(module, NewGELUActivation):
            setattr(model.get_submodule(parent), child, nn.GELU("tanh"))
    return model


def compile_blocks(encoder: TextEncoder) -> TextEncoder:
    """Compile the blocks in place; they are identical, so torch compiles one and reuses it."""
    for block in encoder.model.encoder.block:
        block.compile(dynamic=True)  # batches differ in both dimensions
    return encoder


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as in the model's training: encoding repaired, HTML unescaped twice, whitespace collapsed."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokenize_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of clean prompts, truncated to 512 including the end token."""
    return encoder.tokenizer(list(prompts), truncation=True, max_length=TEXT_LENGTH).input_ids


def group_by_length(tokens: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Return batches of prompt indices, shortest first, of one prompt or at most `max_tokens` including padding."""
    batches: list[list[int]] = []
    # sorted by length, so that little padding is computed and the last prompt of a batch is its longest
    for index in sorted(range(len(tokens)), key=lambda index: len(tokens[index])):
        if batches and (len(batches[-1]) + 1) * len(tokens[index]) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_tokens(tokens: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids padded to the longest prompt (B L) and the mask (B L), True at tokens."""
    ids = pad_sequence([torch.tensor(line) for line in tokens], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(line) for line in tokens])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]  # not ids != pad_id: a prompt may contain that token


@torch.no_grad()
def embed_prompts(
    encoder: TextEncoder, tokens: Sequence[Sequence[int]], *, max_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Return embeddings (L D) in a dtype on the CPU, without padding rows, in the order of `tokens`.

    On a GPU they are copied asynchronously: synchronize with the device before reading them.
    """
    device = encoder.model.device
    embeddings: list[Tensor] = [torch.empty(0)] * len(tokens)
    for batch in group_by_length(tokens, max_tokens):
        ids, mask = pad_tokens([tokens[index] for index in batch], encoder.tokenizer.pad_token_id)
        hidden = encoder.model(copy_async(ids, device), copy_async(mask, device)).last_hidden_state
        # the next batch is queued before this copy has finished: the GPU never waits for Python
        hidden = copy_async(hidden.to(dtype), torch.device("cpu"))
        for row, index in enumerate(batch):
            embeddings[index] = hidden[row, : len(tokens[index])]
    return embeddings
