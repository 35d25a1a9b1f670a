"""Rows -> shards on one device. Files are read and prompts tokenised ahead, in other processes and threads; shards are
written behind; in between the two models work on batches. Shapes: B batch, C channels, H W latent size, L text rows.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path

import numpy
import torch
from safetensors.torch import save
from torch import Tensor

from common.device import copy_async, pick_device, record_event
from common.files import write_file
from common.model_folder import locate_model
from common.progress import track_progress
from shards.manifest import NEGATIVE_FILE
from shards.record import Record, RecordSource
from shards.writer import RowFailure, ShardIndex, shard_file_name, write_shard
from stage1_encode.config import EncodeConfig
from stage1_encode.dataset_folder import report_write_errors
from stage1_encode.media.first_frame import FirstFrame, UnreadableError
from stage1_encode.media.reader_pool import ReaderPool, default_worker_count, read_frames_ahead
from stage1_encode.media.rows import Row, rows_digest
from stage1_encode.models import text_encoder, vae

ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")
WRITER_THREADS = 2  # shards hashed and written at once


@dataclass(frozen=True)
class ShardTask:
    """One shard to make."""

    number: int
    rows: list[Row]


@dataclass(frozen=True)
class PreparedTask:
    """A task with its prompts ready for the text encoder."""

    task: ShardTask
    prompts: list[str]  # clean
    tokens: list[list[int]]


@dataclass(frozen=True)
class EncoderModels:
    """The two models of stage one."""

    vae: vae.FrameEncoder
    text: text_encoder.TextEncoder


def load_encoders(config: EncodeConfig) -> EncoderModels:
    """Read both models onto the device."""
    folder, device = locate_model(config.model, ENCODER_PARTS), pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory and events would open the first GPU too
    autoencoder = vae.load_vae(folder, dtype=vae.parse_vae_dtype(config.vae_dtype), device=device)
    return prepare_encoders(
        config,
        autoencoder,
        text_encoder.load_text_encoder(folder, dtype=getattr(torch, config.text_dtype), device=device),
    )


def prepare_encoders(config: EncodeConfig, autoencoder: vae.WanVae, prompts: text_encoder.TextEncoder) -> EncoderModels:
    """Fit two loaded models to their work, which for the VAE is single frames."""
    tf32 = config.vae_dtype == vae.TF32
    if not config.compile:
        return EncoderModels(vae.make_frame_encoder(autoencoder, tf32=tf32), prompts)
    return EncoderModels(
        vae.make_frame_encoder(autoencoder, compiled_batch=config.batch_size, tf32=tf32),
        text_encoder.compile_blocks(prompts),
    )


def write_negative_embedding(config: EncodeConfig, encoders: EncoderModels) -> None:
    """Embed the negative prompt."""
    tokens = text_encoder.tokenize_prompts(encoders.text, [text_encoder.clean_prompt(config.negative_prompt)])
    embedding = text_encoder.embed_prompts(encoders.text, tokens, max_tokens=config.text_batch_tokens)[0]
    if event := record_event(encoders.text.model.device):
        event.synchronize()
    folder = Path(config.out)
    with report_write_errors(folder):
        write_file(folder / NEGATIVE_FILE, save({"text": embedding}))


def start_readers(config: EncodeConfig) -> ReaderPool:
    """Start the processes that read files: best before the models load. To be closed."""
    return ReaderPool(config.workers or default_worker_count(), config.spec, config.read_timeout)


def make_shards(
    config: EncodeConfig, encoders: EncoderModels, readers: ReaderPool, tasks: Iterable[ShardTask], *, total: int
) -> Iterator[ShardIndex]:
    """Make shards one after the other and yield their sidecars' content; `total` rows are shown as progress."""
    reader_tasks, encoder_tasks = tee(tasks)
    rows = chain.from_iterable(task.rows for task in reader_tasks)
    depth = 2 * (readers.count + config.batch_size)
    frames = track_progress(
        read_frames_ahead(rows, readers, Path(config.data), depth=depth), total=total, label="encode"
    )
    written: deque[Future[ShardIndex]] = deque()
    with (
        ThreadPoolExecutor(1) as preparer,
        ThreadPoolExecutor(WRITER_THREADS, initializer=limit_torch_threads) as writers,
    ):
        for prepared in prepare_tasks_ahead(encoder_tasks, encoders.text, preparer):
            encoded = encode_shard(config, encoders, prepared, frames)
            written.append(writers.submit(save_shard, config, prepared.task, encoded))
            if len(written) > WRITER_THREADS:
                yield written.popleft().result()
        while written:
            yield written.popleft().result()


def limit_torch_threads() -> None:
    """Let torch's small work in a thread begun now stay in it: threads of its own would wait for busy cores."""
    torch.set_num_threads(1)


def prepare_task(task: ShardTask, encoder: text_encoder.TextEncoder) -> PreparedTask:
    """Clean and tokenise the prompts of a task."""
    prompts = [text_encoder.clean_prompt(row.prompt) for row in task.rows]
    return PreparedTask(task, prompts, text_encoder.tokenize_prompts(encoder, prompts))


def prepare_tasks_ahead(
    tasks: Iterable[ShardTask], encoder: text_encoder.TextEncoder, preparer: ThreadPoolExecutor
) -> Iterator[PreparedTask]:
    """Each task prepared, the next one being prepared meanwhile."""
    pending: Future[PreparedTask] | None = None
    for task in tasks:
        next_pending = preparer.submit(prepare_task, task, encoder)
        if pending:
            yield pending.result()
        pending = next_pending
    if pending:
        yield pending.result()


@dataclass(frozen=True)
class EncodedRow:
    """A row that becomes a record."""

    row: Row
    prompt: str
    text: Tensor  # (L D)
    size: tuple[int, int] | None  # of the upright source frame; None = text only


@dataclass(frozen=True)
class EncodedShard:
    """What a task gives; its tensors may be read after `ready`."""

    rows: list[EncodedRow]
    latents: list[Tensor]  # (C 1 H W) of those with a frame, in order
    failures: list[RowFailure]
    ready_event: torch.cuda.Event | None


def encode_shard(
    config: EncodeConfig,
    encoders: EncoderModels,
    prepared: PreparedTask,
    frames: Iterator[tuple[Row, "Future[FirstFrame] | None"]],
) -> EncodedShard:
    """Begin to encode one task; takes exactly its rows from `frames`."""
    texts = text_encoder.embed_prompts(encoders.text, prepared.tokens, max_tokens=config.text_batch_tokens)
    encoded_rows: list[EncodedRow] = []
    failures: list[RowFailure] = []
    batches = FrameBatcher(encoders.vae, config.batch_size)
    for prompt, embedding, (row, pending_frame) in zip(prepared.prompts, texts, frames, strict=False):
        problem = row.problem or ("" if prompt else "the prompt is empty")
        try:
            frame = pending_frame.result() if pending_frame else None
        except UnreadableError as error:
            problem = problem or str(error)
        if problem:
            failures.append(RowFailure(row.line, row.path, problem))
            continue
        encoded_rows.append(EncodedRow(row, prompt, embedding, frame.size if frame else None))
        if frame:
            batches.add_picture(frame.pixels)
    return EncodedShard(encoded_rows, batches.encode_remaining(), failures, record_event(encoders.text.model.device))


def build_records(config: EncodeConfig, encoded_rows: list[EncodedRow], latents: list[Tensor]) -> list[Record]:
    """Join rows with their latents (C 1 H W); ValueError where a precision was too small for a model."""
    remaining_latents, records = iter(latents), []
    for encoded_row in encoded_rows:
        latent = next(remaining_latents) if encoded_row.size else None
        for name, tensor, dtype in (("vae", latent, config.vae_dtype), ("text", encoded_row.text, config.text_dtype)):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(
                    f"{name}_dtype={dtype}: line {encoded_row.row.line} overflows; choose float32 or bfloat16"
                )
        source = RecordSource(
            encoded_row.prompt, encoded_row.row.path, encoded_row.row.line, 0, encoded_row.size, encoded_row.row.seed
        )
        records.append(Record(encoded_row.row.key, source, latent, encoded_row.text))
    return records


class FrameBatcher:
    """Pictures collected into batches for the VAE."""

    def __init__(self, model: vae.FrameEncoder, size: int) -> None:
        self.model, self.size = model, size
        self.pending: list[numpy.ndarray] = []
        self.latents: list[Tensor] = []

    def add_picture(self, pixels: numpy.ndarray) -> None:
        """Take one picture (X Y 3) uint8, and encode once there are enough."""
        self.pending.append(pixels)
        if len(self.pending) == self.size:
            self._encode_batch()

    def _encode_batch(self) -> None:
        shape = (len(self.pending), *self.pending[0].shape)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.model.mean.device.type == "cuda")
        numpy.stack(self.pending, out=pixels.numpy())
        latents = vae.encode_frames(self.model, pixels).to(torch.bfloat16)
        self.latents += list(copy_async(latents, torch.device("cpu")))
        self.pending = []

    def encode_remaining(self) -> list[Tensor]:
        """The latents (C 1 H W) bf16 on the CPU of all pictures in order, perhaps not there yet."""
        if self.pending:
            self._encode_batch()
        return self.latents


def save_shard(config: EncodeConfig, task: ShardTask, encoded: EncodedShard) -> ShardIndex:
    """Wait for the models and write one shard; ValueError where the folder cannot take it."""
    if encoded.ready_event:
        encoded.ready_event.synchronize()
    records = build_records(config, encoded.rows, encoded.latents)
    folder, name, digest = Path(config.out), shard_file_name(task.number), rows_digest(task.rows)
    with report_write_errors(folder):
        return write_shard(folder, name, records, failures=encoded.failures, rows_sha256=digest)
