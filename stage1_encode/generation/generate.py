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
from stage1_encode.generation.condition_encoder import ConditionEncoder, encode_conditions, encode_picture
from stage1_encode.generation.decode import CONTACT_SHEET, MAX_SHEET_ROWS, make_thumbnails, write_contact_sheet
from stage1_encode.media.rows import Row, read_shard_rows
from stage1_encode.media.video_writer import VideoWriter
from stage1_encode.models import vae

GROUP_NAME, SHEET_COLUMNS = "sample", 6  # name in the store; frames on the contact sheet
ROWS_PER_CHUNK = 64  # rows whose texts are embedded at once


class LatentSampler(Protocol):
    """Records -> latents."""

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int) -> Tensor:
        """Latents (B C T H W) of records; a segment has noise of its own."""
        ...

    def move_to(self, device: torch.device) -> None:
        """Bring the network to a device."""
        ...


@dataclass(frozen=True)
class MemoryPlan:
    """What stays on the device, and how much is decoded at once."""

    keep_text_encoder: bool = True  # the text encoder stays
    keep_denoiser: bool = True  # the denoiser stays while latents are decoded
    chunk_frames: int = vae.DEFAULT_CHUNK_FRAMES  # latent frames decoded at once


# GiB of a card, at 121 x 704 x 1280, fastest first: benchmarks/results/sample-*, and the context of the driver
REQUIRED_GIB = {"full": 33, "24gb": 22, "16gb": 15}
MEMORY_PLANS = {
    "full": MemoryPlan(),
    "24gb": MemoryPlan(keep_text_encoder=False, chunk_frames=1),
    "16gb": MemoryPlan(keep_text_encoder=False, keep_denoiser=False),
}


def choose_memory_plan(memory: str, device: torch.device) -> MemoryPlan:
    """What stays where in a memory mode, or in the fastest one that the card has room for.

    ValueError where the card is too small; it says what would fit.
    """
    if device.type == "cpu":
        return MEMORY_PLANS["full"]
    card_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    fitting = [name for name, needed in REQUIRED_GIB.items() if needed <= card_gib]
    if not fitting or (memory != "auto" and memory not in fitting):
        required_mode = "16gb" if memory == "auto" else memory
        remedy = f"--memory {fitting[0]} fits" if fitting else "nothing fits; take a larger one or --device cpu"
        raise ValueError(
            f"memory={memory}: {required_mode} needs {REQUIRED_GIB[required_mode]} GiB and the card has {card_gib:.0f}; {remedy}"
        )
    return MEMORY_PLANS[fitting[0] if memory == "auto" else memory]


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be made."""

    csv_path: Path  # CSV of prompts and pictures
    out: Path  # an mp4 file for one row, else a folder
    store: Path  # of the latents
    spec: VideoSpec
    seed: int  # of rows that name none
    segments: int = 1
    batch_size: int = 1
    rank: int = 0  # which of `world` processes this is: it makes every world-th row
    world: int = 1


def generate_videos(
    request: GenerationRequest, encoder: ConditionEncoder, sampler: LatentSampler, memory_plan: MemoryPlan
) -> list[Path]:
    """Make every video of an order, and a contact sheet of several; the files made.

    ValueError where the GPU's memory is too small for it.
    """
    try:
        return _generate_all(request, encoder, sampler, memory_plan)
    except torch.OutOfMemoryError as error:
        size = (
            f"{request.spec.num_frames} x {request.spec.height} x {request.spec.width}, batch size {request.batch_size}"
        )
        smaller = (
            "a smaller --batch-size, --height or --width" if memory_plan == MEMORY_PLANS["16gb"] else "--memory 16gb"
        )
        raise ValueError(f"the GPU's memory is too small for {size}: give {smaller}") from error


def _generate_all(
    request: GenerationRequest, encoder: ConditionEncoder, sampler: LatentSampler, memory_plan: MemoryPlan
) -> list[Path]:
    (all_rows,) = read_shard_rows(request.csv_path, shard_size=sys.maxsize, text_only=True)
    rows = all_rows[request.rank :: request.world]
    if not rows:
        return []
    seeds = [request.seed if row.seed is None else row.seed for row in rows]
    latent_store.create_group(request.store, build_latent_group(request, rows, seeds))
    with (
        ExitStack() as open_writers,
        ThreadPoolExecutor(1) as store_thread,
        ProgressBar(len(rows), label="sample") as progress,
    ):
        generator = VideoGenerator(request, encoder, sampler, memory_plan, open_writers, store_thread)
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            for count in generator.generate_rows(
                rows[start : start + ROWS_PER_CHUNK], seeds[start : start + ROWS_PER_CHUNK]
            ):
                progress.advance(count=count)
        files = generator.finish_files()
    latent_store.finish_group(request.store, GROUP_NAME)
    return files


def build_latent_group(
    request: GenerationRequest, rows: Sequence[Row], seeds: Sequence[int]
) -> latent_store.LatentGroup:
    """What the store will hold: for every row its segments, one after the other."""
    count = request.segments
    keys = tuple(f"{row.key}-{segment}" if count > 1 else row.key for row in rows for segment in range(count))
    prompts = tuple(row.prompt for row in rows for _ in range(count))
    return latent_store.LatentGroup(
        GROUP_NAME, request.spec, keys, prompts, tuple(seed for seed in seeds for _ in range(count))
    )


class VideoJob:
    """One video being made: its film and, where it is shown, the frames of it on the contact sheet."""

    def __init__(self, path: Path, request: GenerationRequest, *, on_sheet: bool) -> None:
        self.writer = VideoWriter(path, fps=request.spec.fps)
        frames = 1 + (request.spec.num_frames - 1) * request.segments
        self.sheet_indices = (
            numpy.linspace(0, frames - 1, SHEET_COLUMNS if on_sheet else 0).round().astype(int).tolist()
        )
        self.frame_count, self.sheet_frames = 0, list[Tensor]()

    def add_frames(self, frames: Tensor) -> None:
        """Append frames (F X Y 3) uint8."""
        self.writer.add_frames(frames)
        local_indices = [
            index - self.frame_count for index in self.sheet_indices if 0 <= index - self.frame_count < len(frames)
        ]
        self.sheet_frames += [copy_async(frames[index].clone(), torch.device("cpu")) for index in local_indices]
        self.frame_count += len(frames)


class VideoGenerator:
    """The state of an order: what is being written."""

    def __init__(
        self,
        request: GenerationRequest,
        encoder: ConditionEncoder,
        sampler: LatentSampler,
        memory_plan: MemoryPlan,
        open_writers: ExitStack,
        store_thread: ThreadPoolExecutor,
    ) -> None:
        self.request, self.models, self.sampler, self.memory_plan = request, encoder, sampler, memory_plan
        self.open_writers, self.store_thread = open_writers, store_thread
        self.jobs: list[VideoJob] = []
        self.pending_stores = deque[Future[None]]()

    def generate_rows(self, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[int]:
        """Begin the videos of some rows; yields how many at a time."""
        if not self.memory_plan.keep_text_encoder:
            self.sampler.move_to(torch.device("cpu"))
        request = self.request
        records = encode_conditions(
            self.models, rows, request.csv_path, request.spec, keep_text_on_device=self.memory_plan.keep_text_encoder
        )
        for indices in group_by_first_frame(records, request.batch_size):
            previous_jobs = self.jobs[-request.batch_size :]
            self.generate_batch([records[index] for index in indices], [seeds[index] for index in indices])
            for job in previous_jobs:
                job.writer.finish_file()
            yield len(indices)

    def generate_batch(self, records: Sequence[Record], seeds: Sequence[int]) -> None:
        """Begin the videos of one batch, segment by segment."""
        jobs = [
            VideoJob(self.video_path(record), self.request, on_sheet=self.row_position(record) < MAX_SHEET_ROWS)
            for record in records
        ]
        for job in jobs:
            self.open_writers.push(job.writer)
        for segment in range(self.request.segments):
            self.sampler.move_to(self.models.device)
            x0 = self.sampler(records, seeds, segment)
            if not self.memory_plan.keep_denoiser:
                self.sampler.move_to(torch.device("cpu"))
            self.store_latents(records, x0, segment)
            last_frames = [
                self.decode_segment(job, video, skip_first=segment > 0) for job, video in zip(jobs, x0, strict=True)
            ]
            if segment + 1 < self.request.segments:
                frames = [encode_picture(self.models, last) for last in last_frames]
                records = [
                    replace(previous, first_frame=frame) for previous, frame in zip(records, frames, strict=True)
                ]
        self.jobs += jobs

    def decode_segment(self, job: VideoJob, video: Tensor, *, skip_first: bool) -> Tensor:
        """Decode latents (C T H W) into a film, without the first frame where it is the last one of the segment before.

        The last frame (X Y 3) uint8.
        """
        for frames in vae.decode_stream(self.models.vae, video, chunk_frames=self.memory_plan.chunk_frames):
            job.add_frames(frames[1:] if skip_first else frames)
            skip_first = False
        if not self.memory_plan.keep_denoiser:
            self.models.vae.decoder.free_memory()
        return frames[-1]

    def store_latents(self, records: Sequence[Record], x0: Tensor, segment: int) -> None:
        """Store latents (B C T H W) meanwhile; when this returns, those before them are stored."""
        rows = [self.row_position(record) * self.request.segments + segment for record in records]
        self.pending_stores.append(
            self.store_thread.submit(
                self._write_latents, rows, copy_async(x0, torch.device("cpu")), record_event(x0.device)
            )
        )
        if len(self.pending_stores) > 1:
            self.pending_stores.popleft().result()

    def _write_latents(self, rows: Sequence[int], x0: Tensor, event: torch.cuda.Event | None) -> None:
        if event:
            event.synchronize()
        if not x0.isfinite().all():
            raise ValueError(f"the latents of row {rows[0]} are not finite: is the checkpoint sound?")
        latent_store.write_latents(self.request.store, GROUP_NAME, rows, x0)

    def row_position(self, record: Record) -> int:
        """Place of a record's row among those of this process."""
        return int(record.key) // self.request.world

    def video_path(self, record: Record) -> Path:
        """Where a record's video goes."""
        return self.request.out if self.request.out.suffix == ".mp4" else self.request.out / f"{record.key}.mp4"

    def finish_files(self) -> list[Path]:
        """Wait for all that is being written; the files."""
        for pending in self.pending_stores:
            pending.result()
        jobs = sorted(self.jobs, key=lambda job: job.writer.path)
        files = [job.writer.finish_file() for job in jobs]
        if self.request.out.suffix == ".mp4":
            return files
        sheet_rows = [
            make_thumbnails(torch.stack(job.sheet_frames).numpy(), columns=SHEET_COLUMNS)
            for job in jobs[:MAX_SHEET_ROWS]
        ]
        path = self.request.out / (f"contact-{self.request.rank}.png" if self.request.world > 1 else CONTACT_SHEET)
        return [*files, write_contact_sheet(path, sheet_rows)]
