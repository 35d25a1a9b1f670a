"""From prompts to finished mp4 files in one process. Who denoises is given: `Sampler` is all that is known of it.

The GPU works on one thing at a time; reading, H.264 and the store of latents run beside it, for this video or the one
before. Shapes: B videos, C channels, T latent frames, H W latent size, F frames, X Y pixels.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor

from common.device import copy_async, record_event
from common.progress import ProgressBar
from common.video import VideoSpec
from shards import latent_store
from shards.record import Record, group_by_first_frame
from stage1_encode.generation.condition_encoder import Conditioner, encode_frame, make_records
from stage1_encode.generation.decode import CONTACT, MOST_ROWS, thumbnails, write_sheet
from stage1_encode.media.rows import Row, read_shards
from stage1_encode.media.video_writer import Film
from stage1_encode.models import vae

STEP, COLUMNS = "sample", 6  # name in the store; frames on the contact sheet
TOGETHER = 64  # rows whose texts are embedded at once


class Sampler(Protocol):
    """Records -> latents."""

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int) -> Tensor:
        """Latents (B C T H W) of records; a segment has noise of its own."""
        ...

    def move(self, device: torch.device) -> None:
        """Bring the network to a device."""
        ...


@dataclass(frozen=True)
class Placing:
    """What stays on the device, and how much is decoded at once."""

    text: bool = True  # the text encoder stays
    network: bool = True  # the denoiser stays while latents are decoded
    steps: int = vae.STEPS  # latent frames decoded at once


# GiB of a card, at 121 x 704 x 1280, fastest first: benchmarks/results/sample-*, and the context of the driver
NEEDED = {"full": 33, "24gb": 22, "16gb": 15}
PLACINGS = {"full": Placing(), "24gb": Placing(text=False, steps=1), "16gb": Placing(text=False, network=False)}


def place(memory: str, device: torch.device) -> Placing:
    """What stays where in a memory mode, or in the fastest one that the card has room for.

    ValueError where the card is too small; it says what would fit.
    """
    if device.type == "cpu":
        return PLACINGS["full"]
    there = torch.cuda.get_device_properties(device).total_memory / 2**30
    fitting = [name for name, needed in NEEDED.items() if needed <= there]
    if not fitting or (memory != "auto" and memory not in fitting):
        asked = "16gb" if memory == "auto" else memory
        way = f"--memory {fitting[0]} fits" if fitting else "nothing fits; take a larger one or --device cpu"
        raise ValueError(f"memory={memory}: {asked} needs {NEEDED[asked]} GiB and the card has {there:.0f}; {way}")
    return PLACINGS[fitting[0] if memory == "auto" else memory]


@dataclass(frozen=True)
class Order:
    """What is to be made."""

    table: Path  # CSV of prompts and pictures
    out: Path  # an mp4 file for one row, else a folder
    store: Path  # of the latents
    spec: VideoSpec
    seed: int  # of rows that name none
    segments: int = 1
    batch_size: int = 1
    rank: int = 0  # which of `world` processes this is: it makes every world-th row
    world: int = 1


def make_videos(order: Order, models: Conditioner, sampler: Sampler, placing: Placing) -> list[Path]:
    """Make every video of an order, and a contact sheet of several; the files made.

    ValueError where the GPU's memory is too small for it.
    """
    try:
        return _make(order, models, sampler, placing)
    except torch.OutOfMemoryError as error:
        size = f"{order.spec.num_frames} x {order.spec.height} x {order.spec.width}, batch size {order.batch_size}"
        smaller = "a smaller --batch-size, --height or --width" if placing == PLACINGS["16gb"] else "--memory 16gb"
        raise ValueError(f"the GPU's memory is too small for {size}: give {smaller}") from error


def _make(order: Order, models: Conditioner, sampler: Sampler, placing: Placing) -> list[Path]:
    (every,) = read_shards(order.table, shard_size=sys.maxsize, text_only=True)
    rows = every[order.rank :: order.world]
    if not rows:
        return []
    seeds = [order.seed if row.seed is None else row.seed for row in rows]
    latent_store.create_group(order.store, contents(order, rows, seeds))
    with ExitStack() as films, ThreadPoolExecutor(1) as keeper, ProgressBar(len(rows), label="sample") as progress:
        work = Work(order, models, sampler, placing, films, keeper)
        for start in range(0, len(rows), TOGETHER):
            for done in work.make(rows[start : start + TOGETHER], seeds[start : start + TOGETHER]):
                progress.advance(count=done)
        made = work.finish()
    latent_store.finish_group(order.store, STEP)
    return made


def contents(order: Order, rows: Sequence[Row], seeds: Sequence[int]) -> latent_store.LatentGroup:
    """What the store will hold: for every row its segments, one after the other."""
    count = order.segments
    keys = tuple(f"{row.key}-{part}" if count > 1 else row.key for row in rows for part in range(count))
    prompts = tuple(row.prompt for row in rows for _ in range(count))
    return latent_store.LatentGroup(
        STEP, order.spec, keys, prompts, tuple(seed for seed in seeds for _ in range(count))
    )


class Take:
    """One video being made: its film and, where it is shown, the frames of it on the contact sheet."""

    def __init__(self, path: Path, order: Order, *, shown: bool) -> None:
        self.film = Film(path, fps=order.spec.fps)
        frames = 1 + (order.spec.num_frames - 1) * order.segments
        self.places = numpy.linspace(0, frames - 1, COLUMNS if shown else 0).round().astype(int).tolist()
        self.count, self.shown = 0, list[Tensor]()

    def add(self, frames: Tensor) -> None:
        """Append frames (F X Y 3) uint8."""
        self.film.add(frames)
        here = [place - self.count for place in self.places if 0 <= place - self.count < len(frames)]
        self.shown += [copy_async(frames[place].clone(), torch.device("cpu")) for place in here]
        self.count += len(frames)


class Work:
    """The state of an order: what is being written."""

    def __init__(
        self,
        order: Order,
        models: Conditioner,
        sampler: Sampler,
        placing: Placing,
        films: ExitStack,
        keeper: ThreadPoolExecutor,
    ) -> None:
        self.order, self.models, self.sampler, self.placing = order, models, sampler, placing
        self.films, self.keeper = films, keeper
        self.takes: list[Take] = []
        self.kept = deque[Future[None]]()

    def make(self, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[int]:
        """Begin the videos of some rows; yields how many at a time."""
        if not self.placing.text:
            self.sampler.move(torch.device("cpu"))
        order = self.order
        records = make_records(self.models, rows, order.table, order.spec, stay=self.placing.text)
        for places in group_by_first_frame(records, order.batch_size):
            before = self.takes[-order.batch_size :]
            self.batch([records[place] for place in places], [seeds[place] for place in places])
            for take in before:
                take.film.finish()
            yield len(places)

    def batch(self, records: Sequence[Record], seeds: Sequence[int]) -> None:
        """Begin the videos of one batch, segment by segment."""
        takes = [Take(self.path(record), self.order, shown=self.place(record) < MOST_ROWS) for record in records]
        for take in takes:
            self.films.push(take.film)
        for segment in range(self.order.segments):
            self.sampler.move(self.models.device)
            x0 = self.sampler(records, seeds, segment)
            if not self.placing.network:
                self.sampler.move(torch.device("cpu"))
            self.keep(records, x0, segment)
            lasts = [self.show(take, video, repeated=segment > 0) for take, video in zip(takes, x0, strict=True)]
            if segment + 1 < self.order.segments:
                frames = [encode_frame(self.models, last) for last in lasts]
                records = [replace(one, first_frame=frame) for one, frame in zip(records, frames, strict=True)]
        self.takes += takes

    def show(self, take: Take, video: Tensor, *, repeated: bool) -> Tensor:
        """Decode latents (C T H W) into a film, without the first frame where it is the last one of the segment before.

        The last frame (X Y 3) uint8.
        """
        for frames in vae.stream_video(self.models.vae, video, steps=self.placing.steps):
            take.add(frames[1:] if repeated else frames)
            repeated = False
        if not self.placing.network:
            self.models.vae.decoder.release()
        return frames[-1]

    def keep(self, records: Sequence[Record], x0: Tensor, segment: int) -> None:
        """Store latents (B C T H W) meanwhile; when this returns, those before them are stored."""
        rows = [self.place(record) * self.order.segments + segment for record in records]
        self.kept.append(
            self.keeper.submit(self._write, rows, copy_async(x0, torch.device("cpu")), record_event(x0.device))
        )
        if len(self.kept) > 1:
            self.kept.popleft().result()

    def _write(self, rows: Sequence[int], x0: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready:
            ready.synchronize()
        if not x0.isfinite().all():
            raise ValueError(f"the latents of row {rows[0]} are not finite: is the checkpoint sound?")
        latent_store.write_latents(self.order.store, STEP, rows, x0)

    def place(self, record: Record) -> int:
        """Place of a record's row among those of this process."""
        return int(record.key) // self.order.world

    def path(self, record: Record) -> Path:
        """Where a record's video goes."""
        return self.order.out if self.order.out.suffix == ".mp4" else self.order.out / f"{record.key}.mp4"

    def finish(self) -> list[Path]:
        """Wait for all that is being written; the files."""
        for one in self.kept:
            one.result()
        takes = sorted(self.takes, key=lambda take: take.film.path)
        made = [take.film.finish() for take in takes]
        if self.order.out.suffix == ".mp4":
            return made
        sheet = [thumbnails(torch.stack(take.shown).numpy(), columns=COLUMNS) for take in takes[:MOST_ROWS]]
        path = self.order.out / (f"contact-{self.order.rank}.png" if self.order.world > 1 else CONTACT)
        return [*made, write_sheet(path, sheet)]
