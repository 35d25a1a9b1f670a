"""Rows -> shards on one device. Files are read and prompts tokenised ahead, in other processes and threads; shards are
written behind; in between the two models work on batches. Shapes: B batch, C channels, H W latent size, L text rows.
"""

import os
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

from common.device import pick_device
from common.progress import track
from shards.fingerprint import locate
from shards.manifest import NEGATIVE, write_file
from shards.record import Record, Source
from shards.write import Failure, Index, shard_name, write_shard
from stage1_encode import text, vae
from stage1_encode.config import EncodeConfig
from stage1_encode.frames import Frame, UnreadableError
from stage1_encode.isolate import Readers
from stage1_encode.rows import Row, locate_file, rows_digest

PARTS = ("vae", "text_encoder", "tokenizer")
MOST_WORKERS = 16


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
    text: text.TextEncoder


def load_encoders(config: EncodeConfig) -> Encoders:
    """Read both models onto the device."""
    folder, device = locate(config.model, PARTS), pick_device(config.device)
    whole = vae.load(folder, dtype=getattr(torch, config.vae_dtype), device=device)
    return Encoders(
        vae.frame_encoder(whole, compiled_batch=config.batch_size if config.compile else 0),
        text.load(folder, dtype=getattr(torch, config.text_dtype), device=device),
    )


def write_negative(config: EncodeConfig, encoders: Encoders) -> None:
    """Embed the negative prompt, unless that is done."""
    path = Path(config.out) / NEGATIVE
    if not path.is_file():
        tokens = text.tokenize(encoders.text, [text.clean(config.negative_prompt)])
        write_file(path, save({"text": text.embed(encoders.text, tokens, budget=config.text_tokens)[0]}))


def make_shards(config: EncodeConfig, encoders: Encoders, tasks: Iterable[Task], *, total: int) -> Iterator[Index]:
    """Make shards one after the other and yield their sidecars' content; `total` rows are shown as progress."""
    ahead, later = tee(tasks)
    workers = config.workers or min(os.cpu_count() or 1, MOST_WORKERS)
    readers = Readers(workers, config.spec, config.time_limit)
    try:
        rows = chain.from_iterable(task.rows for task in ahead)
        frames = track(
            read_ahead(rows, readers, Path(config.data), depth=2 * (workers + config.batch_size)),
            total=total,
            label="encode",
        )
        with ThreadPoolExecutor(1) as preparer, ThreadPoolExecutor(1) as writer:
            written: Future[Index] | None = None
            for prepared in prepare_ahead(later, encoders.text, preparer):
                made = encode_shard(config, encoders, prepared, frames)
                if written:
                    yield written.result()
                written = writer.submit(save_shard, config, prepared.task, made)
            if written:
                yield written.result()
    finally:
        readers.close()


def read_ahead(
    rows: Iterable[Row], readers: Readers, table: Path, *, depth: int
) -> Iterator[tuple[Row, "Future[Frame] | None"]]:
    """Each row with its frame to come, `depth` of them begun ahead; None for a row without a file."""
    begun: deque[tuple[Row, Future[Frame] | None]] = deque()
    for row in rows:
        begun.append((row, readers.submit(locate_file(table, row.path)) if row.path and not row.problem else None))
        if len(begun) > depth:
            yield begun.popleft()
    yield from begun


def prepare(task: Task, encoder: text.TextEncoder) -> Prepared:
    """Clean and tokenise the prompts of a task."""
    prompts = [text.clean(row.prompt) for row in task.rows]
    return Prepared(task, prompts, text.tokenize(encoder, prompts))


def prepare_ahead(tasks: Iterable[Task], encoder: text.TextEncoder, preparer: ThreadPoolExecutor) -> Iterator[Prepared]:
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
class Made:
    """What a task gave."""

    records: list[Record]
    failures: list[Failure]


@dataclass(frozen=True)
class Good:
    """A row that becomes a record."""

    row: Row
    prompt: str
    text: Tensor  # (L D)
    size: tuple[int, int] | None  # of the upright source frame; None = text only


def encode_shard(
    config: EncodeConfig,
    encoders: Encoders,
    prepared: Prepared,
    frames: Iterator[tuple[Row, "Future[Frame] | None"]],
) -> Made:
    """Encode one task; takes exactly its rows from `frames`."""
    texts = text.embed(encoders.text, prepared.tokens, budget=config.text_tokens)
    good: list[Good] = []
    failures: list[Failure] = []
    batches = Batches(encoders.vae, config.batch_size)
    for prompt, embedding, (row, coming) in zip(prepared.prompts, texts, frames, strict=False):
        problem = row.problem or ("" if prompt else "the prompt is empty")
        try:
            frame = coming.result() if coming else None
        except UnreadableError as error:
            problem = problem or str(error)
        if problem:
            failures.append(Failure(row.line, row.path, problem))
            continue
        good.append(Good(row, prompt, embedding, frame.size if frame else None))
        if frame:
            batches.add(frame.pixels)
    return Made(to_records(config, good, batches.finish()), failures)


def to_records(config: EncodeConfig, good: list[Good], latents: list[Tensor]) -> list[Record]:
    """Join rows with their latents (C 1 H W); ValueError where a precision was too small for a model."""
    waiting, records = iter(latents), []
    for item in good:
        latent = next(waiting) if item.size else None
        for name, tensor, dtype in (("vae", latent, config.vae_dtype), ("text", item.text, config.text_dtype)):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"{name}_dtype={dtype}: line {item.row.line} overflows; choose float32 or bfloat16")
        source = Source(item.prompt, item.row.path, item.row.line, 0, item.size, item.row.seed)
        records.append(Record(item.row.key, source, latent, item.text))
    return records


class Batches:
    """Pictures collected into batches for the VAE; the latents stay on its device until the end."""

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
        pixels = torch.from_numpy(numpy.stack(self.waiting))
        self.latents.append(vae.encode_frames(self.model, pixels).to(torch.bfloat16))
        self.waiting = []

    def finish(self) -> list[Tensor]:
        """The latents (C 1 H W) bf16 on the CPU of all pictures in order."""
        if self.waiting:
            self._encode()
        return list(torch.cat(self.latents).cpu()) if self.latents else []


def save_shard(config: EncodeConfig, task: Task, made: Made) -> Index:
    """Write one shard; ValueError where the folder cannot take it."""
    try:
        return write_shard(
            Path(config.out),
            shard_name(task.number),
            made.records,
            failures=made.failures,
            rows_sha256=rows_digest(task.rows),
        )
    except OSError as error:
        raise ValueError(f"out={config.out}: {error.strerror}; mend that and run the same command again") from error
