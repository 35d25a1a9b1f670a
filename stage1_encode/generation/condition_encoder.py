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
from stage1_encode.media.first_frame import UnreadableError, read_first_frame
from stage1_encode.media.rows import Row, locate_file
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.models.vae import FrameEncoder, WanVae

TEXT_BATCH_TOKENS = 8192  # embedded at once
PICTURE_THREADS = 8  # pictures read at once, while the texts are embedded
ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class ConditionEncoder:
    """Both models of stage one, and the place where they compute."""

    text: text_encoder.TextEncoder
    vae: WanVae
    frames: FrameEncoder
    device: torch.device

    @cached_property
    def text_tensors(self) -> OffloadedTensors:
        """The text encoder's tensors."""
        return OffloadedTensors([*self.text.model.parameters(), *self.text.model.buffers()])


def load_condition_encoder(
    model: str, *, precision: str, device: torch.device, keep_text_on_device: bool = True, compile_decoder: bool = False
) -> ConditionEncoder:
    """Read both models: the VAE onto the device, the text encoder, always in bf16, too where it is to `stay` there.

    `precision` of the VAE: a type, or auto, which is bf16 on a GPU and float32 elsewhere; `compiled`: its decoder too.
    """
    folder = locate_model(model, ENCODER_PARTS)
    dtype_name = ("bfloat16" if device.type == "cuda" else "float32") if precision == "auto" else precision
    autoencoder = replace(
        vae.load_vae(folder, dtype=getattr(torch, dtype_name), device=device), compiled=compile_decoder
    )
    autoencoder.release_diffusers_decoder()
    prompts = text_encoder.load_text_encoder(
        folder, dtype=torch.bfloat16, device=device if keep_text_on_device else torch.device("cpu")
    )
    return ConditionEncoder(prompts, autoencoder, vae.make_frame_encoder(autoencoder), device)


def encode_conditions(
    encoder: ConditionEncoder, rows: Sequence[Row], table: Path, spec: VideoSpec, *, keep_text_on_device: bool
) -> list[Record]:
    """Records of rows, with the numbers of `encode`; the text encoder is left on the device where `stay`.

    ValueError names the first row that cannot be used.
    """
    row_encoder = RowEncoder(encoder.frames, encoder.text)
    prompts, tokens = row_encoder.tokenize_prompts([row.prompt for row in rows])
    with ThreadPoolExecutor(PICTURE_THREADS) as pool:
        pending_pictures = pool.map(lambda row, prompt: read_row_picture(row, prompt, table, spec), rows, prompts)
        encoder.text_tensors.move_to(encoder.device)
        embeddings = row_encoder.embed_tokens(tokens, max_tokens=TEXT_BATCH_TOKENS)
        pictures = list(pending_pictures)
    unusable_rows = [(row, picture) for row, picture in zip(rows, pictures, strict=True) if isinstance(picture, str)]
    problems = [f"line {row.line}, {row.path}: {picture}" for row, picture in unusable_rows]
    if problems:
        raise ValueError(f"{len(problems)} of the conditions cannot be used; {problems[0]}")
    latents = [encode_picture(encoder, picture) if isinstance(picture, Tensor) else None for picture in pictures]
    if event := record_event(encoder.device):
        event.synchronize()
    if not keep_text_on_device:
        encoder.text_tensors.move_to(torch.device("cpu"))
    return [
        Record(row.key, RecordSource(prompt, row.path, row.line, 0, None, row.seed), latent, embedding)
        for row, prompt, latent, embedding in zip(rows, prompts, latents, embeddings, strict=True)
    ]


def read_row_picture(row: Row, prompt: str, table: Path, spec: VideoSpec) -> Tensor | str | None:
    """The first frame (X Y 3) uint8 of a row, None where it names none, or why the row cannot be used."""
    if problem := row.problem_with(prompt):
        return problem
    if not row.path:
        return None
    try:
        frame = read_first_frame(locate_file(table, row.path), height=spec.height, width=spec.width)
    except UnreadableError as error:
        return str(error)
    return torch.from_numpy(frame.pixels.copy())


def encode_picture(encoder: ConditionEncoder, pixels: Tensor) -> Tensor:
    """The latent (C 1 H W) bf16, on the VAE's device, of a picture (X Y 3) uint8 on any device."""
    return RowEncoder(encoder.frames, encoder.text).encode_pictures(pixels[None])[0]
