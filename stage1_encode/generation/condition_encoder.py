"""Encode prompts and pictures into records in memory, the conditions of `sample`.

Shapes: C channels, H W latent size, X Y pixels.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from common.device import MovableTensors, OffloadedTensors, record_event
from common.model_folder import locate_model
from common.options import FULL_DECODER
from common.video import VideoSpec
from shards.record import Record, RecordSource
from stage1_encode.decoders.load_decoder import use_decoder
from stage1_encode.media.first_frame import UnreadableError, read_first_frame
from stage1_encode.media.rows import Row, locate_file
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.models.vae import FrameEncoder, WanVae

TEXT_BATCH_TOKENS = 8192  # per batch, including padding
PICTURE_THREADS = 8  # that read pictures while the prompts are embedded
ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class ConditionEncoder:
    """The text encoder, the VAE and the device on which they compute."""

    text: text_encoder.TextEncoder
    vae: WanVae
    frames: FrameEncoder
    device: torch.device
    dtype: torch.dtype = torch.bfloat16  # of the text encoder and of the conditions
    streamed_text: MovableTensors | None = None  # the text encoder, if its blocks pass through the GPU one by one

    @cached_property
    def rows(self) -> RowEncoder:
        """Return the same models as `encode` uses them."""
        return RowEncoder(self.frames, self.text, self.dtype)

    @cached_property
    def text_tensors(self) -> MovableTensors:
        """Return the text encoder's tensors, which may be moved to host memory and back."""
        return self.streamed_text or OffloadedTensors([*self.text.model.parameters(), *self.text.model.buffers()])


def load_condition_encoder(
    model: str,
    *,
    precision: str,
    device: torch.device,
    keep_text_on_device: bool = True,
    condition_dtype: str = "bfloat16",
    chunk_frames: int = vae.CHUNK_FRAMES,
    decoder: str = FULL_DECODER,
) -> ConditionEncoder:
    """Load the VAE onto the device, and the text encoder, in `condition_dtype`, onto the device or into host memory.

    `precision` of the VAE: a dtype, or auto, which is bfloat16 on a GPU and float32 on the CPU.
    chunk_frames: latent frames that are decoded at once. decoder: see `use_decoder`.
    """
    folder = locate_model(model, ENCODER_PARTS)
    autoencoder = load_autoencoder(
        folder, precision=precision, device=device, chunk_frames=chunk_frames, decoder=decoder
    )
    text_device = device if keep_text_on_device else torch.device("cpu")
    dtype = getattr(torch, condition_dtype)
    text = text_encoder.load_text_encoder(folder, dtype=dtype, device=text_device)
    return ConditionEncoder(text, autoencoder, vae.make_frame_encoder(autoencoder), device, dtype)


def load_autoencoder(
    folder: Path,
    *,
    precision: str,
    device: torch.device,
    chunk_frames: int = vae.CHUNK_FRAMES,
    decoder: str = FULL_DECODER,
) -> WanVae:
    """Load the VAE of a model folder onto the device; the options are those of `load_condition_encoder`."""
    dtype_name = ("bfloat16" if device.type == "cuda" else "float32") if precision == "auto" else precision
    autoencoder = vae.load_vae(folder, dtype=getattr(torch, dtype_name), device=device)
    autoencoder = use_decoder(replace(autoencoder, chunk_frames=chunk_frames), decoder)
    autoencoder.release_diffusers_decoder()  # the larger half of the VAE, which would lie unused
    return autoencoder


def encode_conditions(
    encoder: ConditionEncoder,
    rows: Sequence[Row],
    table: Path,
    spec: VideoSpec,
    *,
    keep_text_on_device: bool,
    base_folder: str | None = None,
) -> list[Record]:
    """Return the records of rows, in bfloat16 with the same numbers as `encode`.

    The text encoder moves to the device, and back to host memory unless `keep_text_on_device`. ValueError names the
    first row that cannot be used.
    """
    row_encoder = encoder.rows
    prompts, tokens = row_encoder.tokenize_prompts([row.prompt for row in rows])
    with ThreadPoolExecutor(PICTURE_THREADS) as pool:  # PIL and decord release the interpreter lock
        read_picture = partial(read_row_picture, table=table, spec=spec, base_folder=base_folder)
        pending_pictures = pool.map(read_picture, rows, prompts)
        encoder.text_tensors.move_to(encoder.device)
        embeddings = row_encoder.embed_tokens(tokens, max_tokens=TEXT_BATCH_TOKENS)
        pictures = list(pending_pictures)
    refuse_problems(rows, pictures)
    latents = [encode_picture(encoder, picture) if isinstance(picture, Tensor) else None for picture in pictures]
    if event := record_event(encoder.device):  # the embeddings are still being copied to the CPU
        event.synchronize()
    if not keep_text_on_device:
        encoder.text_tensors.move_to(torch.device("cpu"))
    return [
        Record(row.key, RecordSource(prompt, row.path, row.line, 0, None, row.seed), latent, embedding)
        for row, prompt, latent, embedding in zip(rows, prompts, latents, embeddings, strict=True)
    ]


def encode_prompt(encoder: ConditionEncoder, prompt: str, *, keep_text_on_device: bool) -> Tensor:
    """Return the embedding (L D), on the CPU, of one prompt, which may be empty; moves as `encode_conditions`."""
    _, tokens = encoder.rows.tokenize_prompts([prompt])
    encoder.text_tensors.move_to(encoder.device)
    (embedding,) = encoder.rows.embed_tokens(tokens, max_tokens=TEXT_BATCH_TOKENS)
    if event := record_event(encoder.device):
        event.synchronize()
    if not keep_text_on_device:
        encoder.text_tensors.move_to(torch.device("cpu"))
    return embedding


def refuse_problems(rows: Sequence[Row], pictures: Iterable[Tensor | str | None]) -> None:
    """Raise ValueError if a row's picture is the reason why it cannot be used; it names the first such row."""
    pairs = zip(rows, pictures, strict=True)
    problems = [f"line {row.line}, {row.path}: {picture}" for row, picture in pairs if isinstance(picture, str)]
    if problems:
        raise ValueError(f"{len(problems)} of {len(rows)} conditions cannot be used; {problems[0]}")


def check_conditions(rows: Sequence[Row], table: Path, spec: VideoSpec, base_folder: str | None) -> None:
    """Read the pictures of all rows and keep none; ValueError if a row cannot be used."""

    def find_problem(row: Row) -> str | None:
        picture = read_row_picture(row, row.prompt, table, spec, base_folder)
        return picture if isinstance(picture, str) else None

    with ThreadPoolExecutor(PICTURE_THREADS) as pool:
        refuse_problems(rows, pool.map(find_problem, rows))


def read_row_picture(
    row: Row, prompt: str, table: Path, spec: VideoSpec, base_folder: str | None = None
) -> Tensor | str | None:
    """Return a row's first frame (X Y 3) uint8, None if it names no picture, or the reason why it cannot be used."""
    if problem := row.problem_with(prompt):
        return problem
    if not row.path:
        return None
    try:
        frame = read_first_frame(locate_file(table, row.path, base_folder), height=spec.height, width=spec.width)
    except UnreadableError as error:
        return str(error)
    return torch.from_numpy(frame.pixels.copy())  # the array may be read-only


def encode_picture(encoder: ConditionEncoder, pixels: Tensor) -> Tensor:
    """Return the latent (C 1 H W), on the VAE's device, of a picture (X Y 3) uint8 on any device."""
    return encoder.rows.encode_pictures(pixels[None])[0]
