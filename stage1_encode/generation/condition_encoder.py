"""Prompts and pictures -> records in memory: what `sample` makes videos from.

Shapes: C channels, H W latent size, X Y pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.device import OffloadedTensors, record_event
from common.model_folder import locate_model
from common.video import VideoSpec
from shards.record import Record, RecordSource
from stage1_encode.media.first_frame import UnreadableError, first_frame
from stage1_encode.media.rows import Row, locate_file
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.vae import FrameEncoder, Vae

TEXT_TOKENS = 8192  # embedded at once
READERS = 8  # pictures read at once, while the texts are embedded
PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Conditioner:
    """Both models of stage one, and the place where they compute."""

    text: text_encoder.TextEncoder
    vae: Vae
    frames: FrameEncoder
    device: torch.device

    @cached_property
    def words(self) -> OffloadedTensors:
        """The text encoder's tensors."""
        return OffloadedTensors([*self.text.model.parameters(), *self.text.model.buffers()])


def load_conditioner(
    model: str, *, precision: str, device: torch.device, stay: bool = True, compiled: bool = False
) -> Conditioner:
    """Read both models: the VAE onto the device, the text encoder, always in bf16, too where it is to `stay` there.

    `precision` of the VAE: a type, or auto, which is bf16 on a GPU and float32 elsewhere; `compiled`: its decoder too.
    """
    folder = locate_model(model, PARTS)
    named = ("bfloat16" if device.type == "cuda" else "float32") if precision == "auto" else precision
    whole = replace(vae.load(folder, dtype=getattr(torch, named), device=device), compiled=compiled)
    whole.keep_fast_decoder()
    prompts = text_encoder.load(folder, dtype=torch.bfloat16, device=device if stay else torch.device("cpu"))
    return Conditioner(prompts, whole, vae.frame_encoder(whole), device)


def make_records(models: Conditioner, rows: Sequence[Row], table: Path, spec: VideoSpec, *, stay: bool) -> list[Record]:
    """Records of rows, with the numbers of `encode`; the text encoder is left on the device where `stay`.

    ValueError names the first row that cannot be used.
    """
    prompts = [text_encoder.clean(row.prompt) for row in rows]
    with ThreadPoolExecutor(READERS) as pool:
        reading = pool.map(lambda row, prompt: read_picture(row, prompt, table, spec), rows, prompts)
        models.words.move(models.device)
        embeddings = text_encoder.embed(models.text, text_encoder.tokenize(models.text, prompts), budget=TEXT_TOKENS)
        pictures = list(reading)
    found_wrong = [(row, found) for row, found in zip(rows, pictures, strict=True) if isinstance(found, str)]
    problems = [f"line {row.line}, {row.path}: {found}" for row, found in found_wrong]
    if problems:
        raise ValueError(f"{len(problems)} of the conditions cannot be used; {problems[0]}")
    latents = [encode_frame(models, found) if isinstance(found, Tensor) else None for found in pictures]
    if ready := record_event(models.device):
        ready.synchronize()
    if not stay:
        models.words.move(torch.device("cpu"))
    return [
        Record(row.key, RecordSource(prompt, row.path, row.line, 0, None, row.seed), latent, embedding)
        for row, prompt, latent, embedding in zip(rows, prompts, latents, embeddings, strict=True)
    ]


def read_picture(row: Row, prompt: str, table: Path, spec: VideoSpec) -> Tensor | str | None:
    """The first frame (X Y 3) uint8 of a row, None where it names none, or why the row cannot be used."""
    if row.problem or not prompt:
        return row.problem or "the prompt is empty"
    if not row.path:
        return None
    try:
        frame = first_frame(locate_file(table, row.path), height=spec.height, width=spec.width)
    except UnreadableError as error:
        return str(error)
    return torch.from_numpy(frame.pixels.copy())


def encode_frame(models: Conditioner, pixels: Tensor) -> Tensor:
    """The latent (C 1 H W) bf16, on the VAE's device, of a picture (X Y 3) uint8 on any device."""
    return vae.encode_frames(models.frames, pixels[None])[0].to(torch.bfloat16)
