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
from stage1_encode.dataset_folder import storing
from stage1_encode.media.first_frame import Frame, UnreadableError
from stage1_encode.media.reader_pool import Readers, default_workers, read_ahead
from stage1_encode.media.rows import Row, rows_digest
from stage1_encode.models import text_encoder, vae

PARTS = ("vae", "text_encoder", "tokenizer")
WRITERS = 2  # shards hashed and written at once


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    number: int
    rows: list[Row]


@dataclass(frozen=True)
class Prepared:
    """A task with its prompts ready for the text encoder."""

    task: Task
    prompts: list[str]  # clean
    tokens: list[list[int]]


@dataclass(frozen=True)
class Encoders:
    """The two models of stage one."""

    vae: vae.FrameEncoder
    text: text_encoder.TextEncoder


def load_encoders(config: EncodeConfig) -> Encoders:
    """Read both models onto the device."""
    folder, device = locate_model(config.model, PARTS), pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory and events would open the first GPU too
    whole = vae.load(folder, dtype=vae.dtype_of(config.vae_dtype), device=device)
    return make_ready(config, whole, text_encoder.load(folder, dtype=getattr(torch, config.text_dtype), device=device))


def make_ready(config: EncodeConfig, whole: vae.Vae, prompts: text_encoder.TextEncoder) -> Encoders:
    """Fit two loaded models to their work, which for the VAE is single frames."""
    tf32 = config.vae_dtype == vae.TF32
    if not config.compile:
        return Encoders(vae.frame_encoder(whole, tf32=tf32), prompts)
    return Encoders(
        vae.frame_encoder(whole, compiled_batch=config.batch_size, tf32=tf32), text_encoder.compiled(prompts)
    )


def write_negative(config: EncodeConfig, encoders: Encoders) -> None:
    """Embed the negative prompt."""
    tokens = text_encoder.tokenize(encoders.text, [text_encoder.clean(config.negative_prompt)])
    embedding = text_encoder.embed(encoders.text, tokens, budget=config.text_tokens)[0]
    if ready := record_event(encoders.text.model.device):
        ready.synchronize()
    folder = Path(config.out)
    with storing(folder):
        write_file(folder / NEGATIVE_FILE, save({"text": embedding}))


def start_readers(config: EncodeConfig) -> Readers:
    """Start the processes that read files: best before the models load. To be closed."""
    return Readers(config.workers or default_workers(), config.spec, config.time_limit)


def make_shards(
    config: EncodeConfig, encoders: Encoders, readers: Readers, tasks: Iterable[Task], *, total: int
) -> Iterator[ShardIndex]:
    """Make shards one after the other and yield their sidecars' content; `total` rows are shown as progress."""
    ahead, later = tee(tasks)
    rows = chain.from_iterable(task.rows for task in ahead)
    depth = 2 * (readers.count + config.batch_size)
    frames = track_progress(read_ahead(rows, readers, Path(config.data), depth=depth), total=total, label="encode")
    written: deque[Future[ShardIndex]] = deque()
    with ThreadPoolExecutor(1) as preparer, ThreadPoolExecutor(WRITERS, initializer=one_thread) as writers:
        for prepared in prepare_ahead(later, encoders.text, preparer):
            made = encode_shard(config, encoders, prepared, frames)
            written.append(writers.submit(save_shard, config, prepared.task, made))
            if len(written) > WRITERS:
                yield written.popleft().result()
        while written:
            yield written.popleft().result()


def one_thread() -> None:
    """Let torch's small work in a thread begun now stay in it: threads of its own would wait for busy cores."""
    torch.set_num_threads(1)


def prepare(task: Task, encoder: text_encoder.TextEncoder) -> Prepared:
    """Clean and tokenise the prompts of a task."""
    prompts = [text_encoder.clean(row.prompt) for row in task.rows]
    return Prepared(task, prompts, text_encoder.tokenize(encoder, prompts))


def prepare_ahead(
    tasks: Iterable[Task], encoder: text_encoder.TextEncoder, preparer: ThreadPoolExecutor
) -> Iterator[Prepared]:
    """Each task prepared, the next one being prepared meanwhile."""
    coming: Future[Prepared] | None = None
    for task in tasks:
        following = preparer.submit(prepare, task, encoder)
        if coming:
            yield coming.result()
        coming = following
    if coming:
        yield coming.result()


@dataclass(frozen=True)
class Good:
    """A row that becomes a record."""

    row: Row
    prompt: str
    text: Tensor  # (L D)
    size: tuple[int, int] | None  # of the upright source frame; None = text only


@dataclass(frozen=True)
class Made:
    """What a task gives; its tensors may be read after `ready`."""

    good: list[Good]
    latents: list[Tensor]  # (C 1 H W) of those with a frame, in order
    failures: list[RowFailure]
    ready: torch.cuda.Event | None


def encode_shard(
    config: EncodeConfig,
    encoders: Encoders,
    prepared: Prepared,
    frames: Iterator[tuple[Row, "Future[Frame] | None"]],
) -> Made:
    """Begin to encode one task; takes exactly its rows from `frames`."""
    texts = text_encoder.embed(encoders.text, prepared.tokens, budget=config.text_tokens)
    good: list[Good] = []
    failures: list[RowFailure] = []
    batches = Batches(encoders.vae, config.batch_size)
    for prompt, embedding, (row, coming) in zip(prepared.prompts, texts, frames, strict=False):
        problem = row.problem or ("" if prompt else "the prompt is empty")
        try:
            frame = coming.result() if coming else None
        except UnreadableError as error:
            problem = problem or str(error)
        if problem:
            failures.append(RowFailure(row.line, row.path, problem))
            continue
        good.append(Good(row, prompt, embedding, frame.size if frame else None))
        if frame:
            batches.add(frame.pixels)
    return Made(good, batches.finish(), failures, record_event(encoders.text.model.device))


def to_records(config: EncodeConfig, good: list[Good], latents: list[Tensor]) -> list[Record]:
    """Join rows with their latents (C 1 H W); ValueError where a precision was too small for a model."""
    waiting, records = iter(latents), []
    for item in good:
        latent = next(waiting) if item.size else None
        for name, tensor, dtype in (("vae", latent, config.vae_dtype), ("text", item.text, config.text_dtype)):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"{name}_dtype={dtype}: line {item.row.line} overflows; choose float32 or bfloat16")
        source = RecordSource(item.prompt, item.row.path, item.row.line, 0, item.size, item.row.seed)
        records.append(Record(item.row.key, source, latent, item.text))
    return records


class Batches:
    """Pictures collected into batches for the VAE."""

    def __init__(self, model: vae.FrameEncoder, size: int) -> None:
        self.model, self.size = model, size
        self.waiting: list[numpy.ndarray] = []
        self.latents: list[Tensor] = []

    def add(self, pixels: numpy.ndarray) -> None:
        """Take one picture (X Y 3) uint8, and encode once there are enough."""
        self.waiting.append(pixels)
        if len(self.waiting) == self.size:
            self._encode()

    def _encode(self) -> None:
        shape = (len(self.waiting), *self.waiting[0].shape)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.model.mean.device.type == "cuda")
        numpy.stack(self.waiting, out=pixels.numpy())
        latents = vae.encode_frames(self.model, pixels).to(torch.bfloat16)
        self.latents += list(copy_async(latents, torch.device("cpu")))
        self.waiting = []

    def finish(self) -> list[Tensor]:
        """The latents (C 1 H W) bf16 on the CPU of all pictures in order, perhaps not there yet."""
        if self.waiting:
            self._encode()
        return self.latents


def save_shard(config: EncodeConfig, task: Task, made: Made) -> ShardIndex:
    """Wait for the models and write one shard; ValueError where the folder cannot take it."""
    if made.ready:
        made.ready.synchronize()
    records = to_records(config, made.good, made.latents)
    folder, name, digest = Path(config.out), shard_file_name(task.number), rows_digest(task.rows)
    with storing(folder):
        return write_shard(folder, name, records, failures=made.failures, rows_sha256=digest)
