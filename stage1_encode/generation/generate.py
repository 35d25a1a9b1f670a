"""Generate mp4 files from prompts and pictures in one process; the denoiser is passed in as a `LatentSampler`.

A batch is decoded in a thread while the next one is denoised, on a GPU in a stream of its own; the reading of pictures,
H.264 and the latent store have threads too. Where models leave the GPU while idle, it does one thing at a time.
Shapes: B videos, C channels, T latent frames, H W latent size, F frames, X Y pixels.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor

from common.device import copy_async, describe_device, record_event
from common.options import FULL_DECODER
from common.planning.cards import Card, find_card
from common.planning.codec_cost import decode_seconds
from common.planning.units import format_bytes, format_hours, free_bytes
from common.progress import ProgressBar
from common.video import VideoSpec
from shards import latent_store
from shards.record import Record, RecordSource, group_by_first_frame
from stage1_encode.generation.condition_encoder import (
    ConditionEncoder,
    check_conditions,
    encode_conditions,
    encode_picture,
)
from stage1_encode.generation.decode import CONTACT_SHEET, MAX_SHEET_ROWS, make_thumbnails, write_contact_sheet
from stage1_encode.media.rows import Row, read_shard_rows
from stage1_encode.media.video_writer import VideoWriter

CPU = torch.device("cpu")
GROUP_NAME, SHEET_COLUMNS = "sample", 6  # group in the latent store; frames per video on the contact sheet
SINGLE = 4  # bytes of a float32
ROWS_PER_CHUNK = 64  # rows whose conditions are encoded together
# GiB that each mode needs at 121 x 704 x 1280, with the driver's context (benchmarks/results/sample-*)
REQUIRED_GIB = {"full": 36, "16gb": 15, "12gb": 11}  # measured: 33.9, 12.5 and 9.3


class LatentSampler(Protocol):
    """A denoiser that turns records into latents."""

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int) -> Tensor:
        """Return latents (B C T H W) of records; each segment has noise of its own."""
        ...

    def move_to(self, device: torch.device) -> None:
        """Move the network to a device."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate, and where to write it."""

    csv_path: Path  # prompts and pictures
    out: Path  # an mp4 file for one row, else a folder
    store: Path  # of the latents
    spec: VideoSpec
    seed: int  # of rows without a seed
    segments: int = 1  # videos in a row, each continuing the one before
    batch_size: int = 1
    rank: int = 0  # this process generates every world-th row, starting with its rank
    world: int = 1
    base_folder: str | None = None  # where relative paths of the CSV start, if not in its folder
    destination: Path | None = None  # where the files are moved at the end, if not `out`
    denoising_seconds: float | None = None  # of a segment, predicted; None if its time is not known
    row_numbers: frozenset[int] | None = None  # of the CSV's rows those that are generated; None = all
    sheet_suffix: str = ""  # of the contact sheet's name
    gpus_per_video: int = 1  # that denoise and decode a video together
    decoder: str = FULL_DECODER  # of option `decoder`; of others no time is predicted

    def seed_of(self, source: Row | RecordSource) -> int:
        """Return the seed of a row."""
        return self.seed if source.seed is None else source.seed


def choose_vram(vram: str, device: torch.device) -> str:
    """Return the mode: `vram` itself, or for auto the first of `REQUIRED_GIB` that the card has memory for.

    full keeps all models on the GPU, 16gb the one that computes, 12gb three blocks of it. A CPU needs no more than
    full. ValueError if the card is too small for the mode.
    """
    if device.type == "cpu":
        return "full" if vram == "auto" else vram
    card_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    fitting = [mode for mode, required_gib in REQUIRED_GIB.items() if card_gib >= required_gib]
    smallest = min(REQUIRED_GIB, key=lambda mode: REQUIRED_GIB[mode])
    mode = next(iter(fitting), smallest) if vram == "auto" else vram
    if mode not in fitting:
        remedy = f"give --vram {fitting[0]}" if fitting else "nothing fits: take a larger card, or give --device cpu"
        raise ValueError(f"vram={vram}: needs {REQUIRED_GIB[mode]} GiB and the card has {card_gib:.0f}; {remedy}")
    return mode


def generate_videos(
    request: GenerationRequest, encoder: ConditionEncoder, sampler: LatentSampler, *, vram: str = "full"
) -> list[Path]:
    """Generate the videos of this rank, and a contact sheet if there may be several; returns the files.

    vram: a mode of `REQUIRED_GIB`; in all but full, large models move to host memory while they are idle. ValueError if
    the GPU's memory is too small.
    """
    (all_rows,) = read_shard_rows(request.csv_path, shard_size=sys.maxsize, text_only=True)
    if request.row_numbers is not None:
        all_rows = [row for row in all_rows if row.number in request.row_numbers]
    rows = all_rows[request.rank :: request.world]
    if not rows:
        return []
    if len(rows) > ROWS_PER_CHUNK:  # a mistake in a late row shows before hours of work
        check_conditions(rows, request.csv_path, request.spec, request.base_folder)
    latent_store.create_group(request.store, build_latent_group(request, rows))
    began = log_start(request, encoder, len(all_rows), vram)
    with (
        report_full_memory(request.spec, request.batch_size, vram),
        ExitStack() as stack,
        ProgressBar(len(rows) * request.segments, label="sample") as progress,
    ):
        store_thread = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(lambda: decode_thread().submit(int).result())  # waits for what is queued, also after an error
        positions = {row.key: index for index, row in enumerate(rows)}
        generator = VideoGenerator(request, encoder, sampler, vram, stack, store_thread, progress, positions)
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            generator.generate_rows(rows[start : start + ROWS_PER_CHUNK])
        files = generator.finish_files()
    latent_store.finish_group(request.store, GROUP_NAME)
    if request.rank == 0:
        seconds = time.monotonic() - began
        on_gpu = encoder.device.type == "cuda"
        peak = f", peak {torch.cuda.max_memory_allocated(encoder.device) / 2**30:.1f} GiB" if on_gpu else ""
        logging.info("%d videos in %.1f s, %.1f s each%s", len(rows), seconds, seconds / len(rows), peak)
    return files


@contextmanager
def report_full_memory(spec: VideoSpec, batch_size: int, vram: str) -> Iterator[None]:
    """Turn the end of the GPU's memory into a ValueError that says what needs less; `vram` is a mode."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = f"{spec.num_frames} x {spec.height} x {spec.width}"
        smaller = list(REQUIRED_GIB)[list(REQUIRED_GIB).index(vram) + 1 :]
        remedy = f"--vram {smaller[0]}" if smaller else "a smaller --batch-size, --height or --width"
        problem = f"videos of {size} do not fit into the GPU's memory"
        raise ValueError(f"batch_size={batch_size}: {problem}; give {remedy}") from error


def log_start(request: GenerationRequest, encoder: ConditionEncoder, videos: int, vram: str) -> float:
    """Say on the first rank what is generated, on what, what it takes, and how to stop; returns the time."""
    if request.rank == 0:
        spec, device, out = request.spec, encoder.device, request.destination or request.out
        size = f"{spec.num_frames} x {spec.height} x {spec.width}"
        segments = f", each of {request.segments} segments" if request.segments > 1 else ""
        logging.info("sample: %d videos of %s%s", videos, size, segments)
        devices = request.world * request.gpus_per_video
        memory = f"; needs about {REQUIRED_GIB[vram]} GiB at 121 x 704 x 1280 (--vram {vram})"
        logging.info("on %d x %s%s", devices, describe_device(device), "" if device.type == "cpu" else memory)
        logging.info("%s", describe_time(request, videos, find_card(describe_device(device))))
        latents = videos * request.segments * SINGLE * prod(spec.latent_shape)
        free = format_bytes(free_bytes(out))
        logging.info("output: %s, with latents of %s; %s free", out, format_bytes(latents), free)
        logging.info("to stop: Ctrl-C; nothing is kept of this start, and earlier videos stay")
    return time.monotonic()


def describe_time(request: GenerationRequest, videos: int, card: Card | None) -> str:
    """Predicted time of all ranks' videos, as `plan` predicts it; with another decoder that of the denoising alone."""
    if card is None:
        return "this device is not in the table of speeds, so watch the progress"
    if request.denoising_seconds is None:
        return "no time is predicted for these options, so watch the progress"
    if request.decoder != FULL_DECODER:
        seconds = request.segments * request.denoising_seconds
        return f"about {seconds:.1f} s of denoising per video; no time is predicted for decoder={request.decoder}"
    decoding = decode_seconds(request.spec, card, gpus=request.gpus_per_video)
    each = request.segments * (request.denoising_seconds + decoding)
    accuracy = "" if card.measured else f" ({card.source})"
    hours = each * -(-videos // request.world) / 3600  # rounded up
    return f"about {each:.1f} s per video once the models are loaded, {format_hours(hours)} in all{accuracy}"


def build_latent_group(request: GenerationRequest, rows: Sequence[Row]) -> latent_store.LatentGroup:
    """Describe what the store will hold: the segments of every row, one after another."""
    segments = [(row, segment) for row in rows for segment in range(request.segments)]
    return latent_store.LatentGroup(
        GROUP_NAME,
        request.spec,
        keys=tuple(f"{row.key}-{segment}" if request.segments > 1 else row.key for row, segment in segments),
        prompts=tuple(row.prompt for row, _ in segments),
        seeds=tuple(request.seed_of(row) for row, _ in segments),
    )


class VideoJob:
    """A video in progress: its file, and the frames of it that the contact sheet will show."""

    def __init__(self, path: Path, request: GenerationRequest, *, on_sheet: bool) -> None:
        self.writer = VideoWriter(path, fps=request.spec.fps)
        last_frame = (request.spec.num_frames - 1) * request.segments
        columns = SHEET_COLUMNS if on_sheet else 0
        self.sheet_indices = numpy.linspace(0, last_frame, columns).round().astype(int).tolist()
        self.frame_count, self.sheet_frames = 0, list[Tensor]()

    def add_frames(self, frames: Tensor) -> None:
        """Append frames (F X Y 3) uint8."""
        self.writer.add_frames(frames)
        for index in self.sheet_indices:
            if self.frame_count <= index < self.frame_count + len(frames):
                # a clone, because a view would keep the whole chunk in memory
                self.sheet_frames.append(copy_async(frames[index - self.frame_count].clone(), CPU))
        self.frame_count += len(frames)


@cache
def decode_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream of all decoding beside denoising, one per GPU: torch keeps freed memory for its stream."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@cache
def decode_thread() -> ThreadPoolExecutor:
    """Return the thread of all decoding in this process: cuDNN chooses its algorithms anew in every thread."""
    return ThreadPoolExecutor(1)


@dataclass
class VideoGenerator:
    """Generates batches of videos."""

    request: GenerationRequest
    encoder: ConditionEncoder
    sampler: LatentSampler
    vram: str  # a mode of `REQUIRED_GIB`
    stack: ExitStack  # closes the files, also after an error
    store_thread: ThreadPoolExecutor
    progress: ProgressBar
    positions: Mapping[str, int]  # of each key's row among those of this rank
    jobs: list[VideoJob] = field(default_factory=list)
    pending_store: Future[None] | None = None
    pending_decode: Future[list[Tensor]] | None = None

    @property
    def offload(self) -> bool:
        """Return whether large models leave the GPU while they are idle."""
        return self.vram != "full"

    def generate_rows(self, rows: Sequence[Row]) -> None:
        """Generate the videos of some rows; those of the last batch may still be being written."""
        table, spec, batch_size = self.request.csv_path, self.request.spec, self.request.batch_size
        self.finish_decoding()  # encoding pictures changes cuDNN's precision, which all threads share
        if self.offload:
            self.sampler.move_to(CPU)  # the text encoder takes its place
        records = encode_conditions(
            self.encoder, rows, table, spec,
            keep_text_on_device=not self.offload, base_folder=self.request.base_folder,
        )  # fmt: skip
        for indices in group_by_first_frame(records, batch_size):
            previous_jobs = self.jobs[-batch_size:]
            self.generate_batch([records[index] for index in indices])
            # only now, so that H.264 of a batch runs while the next one is denoised
            for job in previous_jobs:
                job.writer.finish_file()

    def generate_batch(self, records: Sequence[Record]) -> None:
        """Generate the videos of one batch, segment by segment; their files are completed later."""
        jobs = [self.start_job(record) for record in records]
        seeds = [self.request.seed_of(record.source) for record in records]
        for segment in range(self.request.segments):
            self.sampler.move_to(self.encoder.device)
            x0 = self.sampler(records, seeds, segment)
            if self.offload:
                self.sampler.move_to(CPU)
            self.store_latents(records, x0, segment)
            self.start_decoding(jobs, x0, segment)
            if segment + 1 < self.request.segments:
                first_frames = [encode_picture(self.encoder, frame) for frame in self.finish_decoding()]
                records = [replace(old, first_frame=new) for old, new in zip(records, first_frames, strict=True)]
        self.jobs += jobs

    def start_job(self, record: Record) -> VideoJob:
        """Open the file of a record's video."""
        out = self.request.out
        path = out if out.suffix == ".mp4" else out / f"{record.key}.mp4"
        job = VideoJob(path, self.request, on_sheet=self.positions[record.key] < MAX_SHEET_ROWS)
        self.stack.push(job.writer)
        return job

    def start_decoding(self, jobs: Sequence[VideoJob], x0: Tensor, segment: int) -> None:
        """Decode latents (B C T H W) in the thread; returns when the previous ones are decoded, to bound the memory."""
        self.finish_decoding()
        on_gpu = x0.device.type == "cuda"
        own = torch.cuda.current_stream(x0.device) if on_gpu and self.offload else decode_stream(x0.device)
        self.pending_decode = decode_thread().submit(self._decode, jobs, x0, segment, own, record_event(x0.device))
        if self.offload:
            self.pending_decode.result()  # the memory does not suffice for two things at a time

    def finish_decoding(self) -> list[Tensor]:
        """Wait for the videos that are being decoded; returns the last frame (X Y 3) uint8 of each."""
        if self.pending_decode is None:
            return []
        last_frames, self.pending_decode = self.pending_decode.result(), None
        self.progress.advance(count=len(last_frames))
        return last_frames

    def _decode(
        self,
        jobs: Sequence[VideoJob],
        x0: Tensor,
        segment: int,
        stream: torch.cuda.Stream | None,
        event: torch.cuda.Event | None,
    ) -> list[Tensor]:
        with torch.cuda.stream(stream):  # of None: nothing
            if stream and event:
                stream.wait_event(event)  # the latents may still be being computed
            pairs = zip(jobs, x0, strict=True)
            last_frames = [self.decode_segment(job, video, skip_first=segment > 0) for job, video in pairs]
            # the other stream may use the memory of x0, and read the last frames, only after this one
            if done := record_event(x0.device):
                done.synchronize()
        return last_frames

    def decode_segment(self, job: VideoJob, video: Tensor, *, skip_first: bool) -> Tensor:
        """Decode latents (C T H W) into the file and return the last frame (X Y 3) uint8.

        `skip_first` leaves out the first frame, which repeats the last one of the previous segment.
        """
        for frames in self.encoder.vae.decoder.decode_stream(video):
            job.add_frames(frames[1:] if skip_first else frames)
            skip_first = False
        if self.offload:
            self.encoder.vae.decoder.free_memory()
        return frames[-1]

    def store_latents(self, records: Sequence[Record], x0: Tensor, segment: int) -> None:
        """Write latents (B C T H W) in the thread; returns when the previous ones are written, to bound the memory."""
        rows = [self.positions[record.key] * self.request.segments + segment for record in records]
        previous = self.pending_store
        copied = copy_async(x0, CPU)
        self.pending_store = self.store_thread.submit(self._write_latents, rows, copied, record_event(x0.device))
        if previous:
            previous.result()

    def _write_latents(self, rows: Sequence[int], x0: Tensor, event: torch.cuda.Event | None) -> None:
        if event:
            event.synchronize()  # here, not in the main thread, which queues the next work
        if not x0.isfinite().all():
            raise ValueError(f"the latents of row {rows[0]} are not finite; check the checkpoint")
        latent_store.write_latents(self.request.store, GROUP_NAME, rows, x0)

    def finish_files(self) -> list[Path]:
        """Wait for everything that is still being written; returns the files."""
        self.finish_decoding()
        if self.pending_store:
            self.pending_store.result()
        jobs = sorted(self.jobs, key=lambda job: job.writer.path)
        files = [job.writer.finish_file() for job in jobs]
        if self.request.out.suffix == ".mp4":
            return files
        shown = [torch.stack(job.sheet_frames).numpy() for job in jobs[:MAX_SHEET_ROWS]]
        sheet_rows = [make_thumbnails(frames, columns=SHEET_COLUMNS) for frames in shown]
        rank = f"-{self.request.rank}" if self.request.world > 1 else ""
        path = self.request.out / CONTACT_SHEET.replace(".", f"{self.request.sheet_suffix}{rank}.")
        return [*files, write_contact_sheet(path, sheet_rows)]
