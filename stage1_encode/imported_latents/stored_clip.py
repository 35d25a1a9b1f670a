"""A clip as another program has encoded it, and the record that it becomes. No model is loaded.

Shapes: C channels, T latent frames, H W latent size, L text rows, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from common.condition import take_first_frame
from common.model_folder import holds_numbers
from common.video import LATENT_CHANNELS, VideoSpec
from shards.record import Record, RecordSource, schema_problems
from stage1_encode.media.rows import Row
from stage1_encode.models.text_encoder import clean_prompt
from stage1_encode.models.vae import LatentStatistics

WAN21_CHANNELS = 16
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StoredClip:
    """What the files of another program hold of one clip."""

    latents: Tensor | None = None  # (C T H W) of the whole clip; None = text only
    text: Tensor | None = None  # (L D), perhaps with zero rows at its end
    problem: str = ""  # why the clip cannot be used; "" = none known yet


@dataclass(frozen=True)
class RecordLayout:
    """What the records of a data set must look like."""

    spec: VideoSpec
    text_dim: int  # D
    statistics: LatentStatistics | None  # that latents are yet to be normalized with; None = they are


def is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value of a file is a tensor of ordinary numbers in memory: not sparse, quantized or without data."""
    return holds_numbers(value) and value.dtype in DTYPES.values()


class ClipError(Exception):
    """Why a clip of another program cannot become a record."""


def channel_problem(shape: Sequence[int]) -> str:
    """What model latents of a shape (C T H W) belong to, if it is another one; "" = it is TI2V-5B."""
    if len(shape) != 4:
        return f"the latents have {len(shape)} dimensions, expected channels, frames, height and width"
    if shape[0] == WAN21_CHANNELS:
        return f"latents of {WAN21_CHANNELS} channels belong to Wan2.1 or a 14B model, TI2V-5B has {LATENT_CHANNELS}"
    return "" if shape[0] == LATENT_CHANNELS else f"latents of {shape[0]} channels, TI2V-5B has {LATENT_CHANNELS}"


def to_record(row: Row, clip: StoredClip, layout: RecordLayout) -> Record:
    """The record of a row; `ClipError` if its values or shapes cannot be those of the data set."""
    prompt = clean_prompt(row.prompt)
    if problem := row.problem_with(prompt) or clip.problem:
        raise ClipError(problem)
    frame = None if clip.latents is None else to_first_frame(clip.latents, layout)
    text = trim_text(clip.text)
    record = Record(row.key, RecordSource(prompt, row.path, row.line), frame, text)
    if problems := schema_problems(record, layout.spec.first_frame_shape, layout.text_dim):
        raise ClipError(problems[0])
    for name, tensor in (("first frame", frame), ("text", text)):
        if tensor is not None and not tensor.isfinite().all():  # also of a value beyond bfloat16
            raise ClipError(f"the {name} holds NaN or infinity")
        if tensor is not None and not tensor.any():  # a part of a file that was never written
            raise ClipError(f"the {name} holds only zeros")
    return record


def to_first_frame(latents: Tensor, layout: RecordLayout) -> Tensor:
    """The normalized latent (C 1 H W) bf16 of the first frame of a clip with latents (C T H W); `ClipError`."""
    if problem := channel_problem(latents.shape):
        raise ClipError(problem)
    frame = take_first_frame(latents)
    if layout.statistics is not None:
        frame = layout.statistics.normalize(frame.float())
    return frame.to(torch.bfloat16, copy=True)  # copied: the whole clip, or its file, is not needed any more


def trim_text(text: Tensor | None) -> Tensor:
    """An embedding (L D) bf16 without the zero rows at its end, which stand for padding; `ClipError`."""
    if text is None or text.ndim != 2:
        shape = "missing" if text is None else f"of shape {tuple(text.shape)}"
        raise ClipError(f"the text embedding is {shape}, expected rows and columns")
    rows = text.any(dim=1).nonzero()
    length = int(rows[-1]) + 1 if len(rows) else 1
    return text[:length].to(torch.bfloat16, copy=True)
