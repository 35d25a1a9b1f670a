"""Rows -> shards on one device. Files are read and prompts tokenized ahead, in other processes and threads; the two
models work on batches; shards are written behind.

Shapes: B batch, C channels, H W latent size, L text rows, X Y pixel height and width.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy
import torch
from safetensors.torch import save
from torch import Tensor

from common.device import copy_async, pick_device, record_event
from common.files import report_write_errors, write_file
from common.model_folder import locate_model
from common.progress import ProgressBar
from shards.manifest import NEGATIVE_FILE
from shards.record import Record, RecordSource
from shards.writer import RowFailure, ShardIndex, shard_file_name, write_shard
from stage1_encode.config import EncodeConfig
from stage1_encode.media.color import ColorRules, is_changed
from stage1_encode.media.first_frame import FirstFrame, UnreadableError
from stage1_encode.media.reader_pool import ReaderPool, default_worker_count, read_frames_ahead
from stage1_encode.media.rows import Row, TooManyFailuresError, count_reasons, rows_digest
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.video_sizes.row_sizes import size_problem

ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")
WRITER_THREADS = 2  # shards hashed and written at once


@dataclass(frozen=True)
class ShardJob:
    """A shard to encode. Take exactly its frames before the next job's: all jobs share one reader pool."""

    number: int
    rows: list[Row]
    frames: Iterator["Future[FirstFrame] | None"]  # one per row, read ahead; None = row without a usable file
    prompts: "Future[tuple[list[str], list[list[int]]]]"  # cleaned prompts and token ids


@dataclass
class RowCounter:
    """Counts the rows of a run, for its progress and to end it if its first rows all fail."""

    progress: ProgressBar
    stop_after_failures: int  # 0 = never
    reasons: list[str] = field(default_factory=list)  # of the failures before the first success
    has_succeeded: bool = False

    def count_row(self, problem: str) -> None:
        """Count a row with its problem, "" = none; `TooManyFailuresError` if there have been only problems."""
        self.progress.advance()
        self.has_succeeded = self.has_succeeded or not problem
        if self.has_succeeded or not self.stop_after_failures:
            return
        self.reasons.append(problem)
        if len(self.reasons) >= self.stop_after_failures:
            raise TooManyFailuresError(
                f"the first {len(self.reasons)} rows all failed: {count_reasons(self.reasons)}; correct the CSV or "
                "--base-folder and rerun the same command, or go on in spite of it with --stop-after-failures 0"
            )


@dataclass(frozen=True)
class EncodedShard:
    """The records and failures of a shard; the records' tensors may be read after `ready_event`."""

    records: list[Record]
    failures: list[RowFailure]
    notes: Counter[str]  # {what was done to the colors, or is remarkable: number of records}
    ready_event: torch.cuda.Event | None  # None on a CPU


def load_encoders(config: EncodeConfig) -> RowEncoder:
    """Load both models onto the device; ValueError if one cannot be read."""
    folder, device = locate_model(config.model, ENCODER_PARTS), pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise pinned memory and events would open the first GPU, too
    autoencoder = vae.load_vae(folder, dtype=vae.parse_vae_dtype(config.vae_dtype), device=device)
    text = text_encoder.load_text_encoder(folder, dtype=getattr(torch, config.text_dtype), device=device)
    return prepare_encoders(config, autoencoder, text)


def prepare_encoders(config: EncodeConfig, autoencoder: vae.WanVae, text: text_encoder.TextEncoder) -> RowEncoder:
    """Turn two loaded models into a `RowEncoder`, compiled if `compile` is set; the VAE must not be used after."""
    compiled_batch = config.batch_size if config.compile else 0
    frames = vae.make_frame_encoder(autoencoder, compiled_batch=compiled_batch, tf32=config.vae_dtype == vae.TF32)
    return RowEncoder(frames, text_encoder.compile_blocks(text) if config.compile else text)


def write_negative_embedding(config: EncodeConfig, encoder: RowEncoder) -> None:
    """Embed the negative prompt and write its file."""
    _, tokens = encoder.tokenize_prompts([config.negative_prompt])
    embedding = encoder.embed_tokens(tokens, max_tokens=config.text_batch_tokens)[0]
    if event := record_event(encoder.text.model.device):
        event.synchronize()  # the embedding is copied asynchronously
    save_negative_embedding(config, embedding)


def save_negative_embedding(config: EncodeConfig, embedding: Tensor) -> None:
    """Write the file of the negative prompt's embedding (L D)."""
    folder = Path(config.out)
    with report_write_errors(folder):
        write_file(folder / NEGATIVE_FILE, save({"text": embedding.contiguous()}))


def start_readers(config: EncodeConfig) -> ReaderPool:
    """Start the processes that read files, best before the models load; the caller closes them."""
    rules = ColorRules(config.hdr, config.untagged_hd)
    return ReaderPool(config.workers or default_worker_count(), config.spec, config.read_timeout, rules)


def make_shards(
    config: EncodeConfig, encoder: RowEncoder, readers: ReaderPool, shards: Mapping[int, list[Row]]
) -> Iterator[tuple[int, ShardIndex]]:
    """Encode shards {number: rows} one after the other; yields each one's number and sidecar, without its members."""
    written: deque[tuple[int, Future[ShardIndex]]] = deque()
    progress = ProgressBar(sum(len(rows) for rows in shards.values()), label="encode")
    counter = RowCounter(progress, config.stop_after_failures)
    # one torch thread per writer: more of them would wait for the busy cores
    with progress, ThreadPoolExecutor(WRITER_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as writers:
        for job in start_jobs(config, encoder, readers, shards):
            encoded = encode_shard(config, encoder, job, counter)
            written.append((job.number, writers.submit(save_shard, config, job.number, job.rows, encoded)))
            if len(written) > WRITER_THREADS:  # bounds the finished shards in memory
                number, index = written.popleft()
                yield number, index.result()
        for number, index in written:
            yield number, index.result()


def start_jobs(
    config: EncodeConfig, encoder: RowEncoder, readers: ReaderPool, shards: Mapping[int, list[Row]]
) -> Iterator[ShardJob]:
    """Yield the jobs of shards {number: rows}; the prompts of the next one are tokenized meanwhile."""
    depth = 2 * (readers.count + config.batch_size)  # frames held in memory, across the borders of shards
    all_rows, table = chain.from_iterable(shards.values()), Path(config.data)
    rows_ahead = read_frames_ahead(all_rows, readers, table, depth=depth, base_folder=config.base_folder)
    waiting: deque[ShardJob] = deque()
    with ThreadPoolExecutor(1) as tokenizer:
        for number, rows in shards.items():
            prompts = tokenizer.submit(encoder.tokenize_prompts, [row.prompt for row in rows])
            waiting.append(ShardJob(number, rows, islice(rows_ahead, len(rows)), prompts))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def encode_shard(config: EncodeConfig, encoder: RowEncoder, job: ShardJob, counter: RowCounter) -> EncodedShard:
    """Begin to encode a job: on a GPU the tensors are computed after this returns, see `ready_event`."""
    prompts, tokens = job.prompts.result()
    texts = encoder.embed_tokens(tokens, max_tokens=config.text_batch_tokens)
    records: list[Record] = []
    failures: list[RowFailure] = []
    pictures: dict[int, numpy.ndarray] = {}  # by record index; one batch, so that few are in memory
    latents: dict[int, Tensor] = {}
    notes = Counter[str]()
    for row, prompt, text, pending_frame in zip(job.rows, prompts, texts, job.frames, strict=True):
        frame, problem = wait_for_frame(row, prompt, pending_frame)
        problem = problem or (size_problem(row, frame, config.frame_sizes, config.max_upscale) if frame else "")
        counter.count_row(problem)
        if problem:
            failures.append(RowFailure(row.line, row.path, problem))
            continue
        # The latent follows when its batch is full; the frame index is 0, as this is the first frame.
        source = RecordSource(prompt, row.path, row.line, 0, None, row.seed)
        if frame:
            pictures[len(records)] = frame.pixels
            source = replace(source, size=frame.size, color=frame.color if is_changed(frame.color) else "")
            source = replace(source, crop=frame.crop) if row.video_size else source
            notes.update(filter(None, (frame.color, frame.emptiness)))
        records.append(Record(row.key, source, None, text))
        if len(pictures) == config.batch_size:
            latents |= encode_batch(encoder, pictures)
            pictures = {}
    latents |= encode_batch(encoder, pictures)
    for index, latent in latents.items():
        records[index] = replace(records[index], first_frame=latent)
    return EncodedShard(records, failures, notes, record_event(encoder.text.model.device))


def wait_for_frame(row: Row, prompt: str, pending_frame: "Future[FirstFrame] | None") -> tuple[FirstFrame | None, str]:
    """A row's first frame, if it has one, and why the row cannot be encoded; "" = it can."""
    problem = row.problem_with(prompt)
    try:
        return (pending_frame.result() if pending_frame else None), problem
    except UnreadableError as error:
        return None, problem or str(error)


def encode_batch(encoder: RowEncoder, pictures: dict[int, numpy.ndarray]) -> dict[int, Tensor]:
    """Begin to encode pictures (X Y 3) uint8 into latents (C 1 H W) bf16 on the CPU; the keys stay."""
    if not pictures:
        return {}
    on_gpu = encoder.vae.mean.device.type == "cuda"
    shape = (len(pictures), *next(iter(pictures.values())).shape)
    pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
    numpy.stack(list(pictures.values()), out=pixels.numpy())  # straight into pinned memory
    latents = copy_async(encoder.encode_pictures(pixels), torch.device("cpu"))
    return dict(zip(pictures, latents, strict=True))


def save_shard(config: EncodeConfig, number: int, rows: list[Row], encoded: EncodedShard) -> ShardIndex:
    """Wait for the models, write one shard and return its sidecar without members.

    Raises ValueError if the folder cannot be written or a tensor has overflowed.
    """
    if encoded.ready_event:
        encoded.ready_event.synchronize()
    for record in encoded.records:
        check_finite(config, record)
    folder, name = Path(config.out), shard_file_name(number)
    with report_write_errors(folder):
        index = write_shard(
            folder,
            name,
            encoded.records,
            failures=encoded.failures,
            rows_sha256=rows_digest(rows),
            notes=encoded.notes,
            video_size=(size.height, size.width) if (size := rows[0].video_size) else None,
        )
    return replace(index, members=())  # a large data set has millions of members


def check_finite(config: EncodeConfig, record: Record) -> None:
    """Raise ValueError if a tensor of a record is not finite, which means that a model's precision is too small."""
    tensors = (("vae", record.first_frame, config.vae_dtype), ("text", record.text, config.text_dtype))
    for name, tensor, dtype in tensors:
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name}_dtype={dtype}: line {record.source.line} overflows; choose float32 or bfloat16")
