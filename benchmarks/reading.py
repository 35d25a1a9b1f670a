"""Reading first frames: against the reference's way, short files against long ones, both readers side by side."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import decord
import torch

from benchmarks.runner import Row, resident_peak_mb, time_call
from common.video import VideoSpec
from stage1_encode.media import first_frame
from stage1_encode.media.reader_pool import ReaderPool

MINUTES = (5 / 60, 20 / 60, 1, 2, 4, 10)
best_time = partial(time_call, choose=min)


def read_whole_clip(path: str, spec: VideoSpec) -> torch.Tensor:
    """Return a clip as the reference reads it: every frame decoded and stretched, then a float tensor."""
    reader = decord.VideoReader(path, width=spec.width, height=spec.height)
    pixels = reader.get_batch(range(min(spec.num_frames, len(reader)))).asnumpy()
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1


def count_read_bytes(work: Callable[[], object]) -> int:
    """Return the bytes that this process asked the system for during a piece of work (Linux)."""
    counter = Path("/proc/self/io")
    before = int(counter.read_text().split()[1])
    work()
    return int(counter.read_text().split()[1]) - before


def repeat_clip(clip: str, folder: Path, minutes: float) -> str:
    """Repeat the clip's packets into a file of that many minutes."""
    path = folder / f"{minutes:g}-minutes.mp4"
    with av.open(clip) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        length = max(packet.pts + packet.duration for packet in packets) - min(packet.dts for packet in packets)
        times = [(packet.pts, packet.dts) for packet in packets]
        repeats = max(1, round(minutes * 60 / float(length * packets[0].time_base)))
        for repeat in range(repeats):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.pts, packet.dts, packet.stream = pts + repeat * length, dts + repeat * length, stream
                target.mux(packet)
    return str(path)


def reference_rows(clip: str, spec: VideoSpec) -> Iterator[Row]:
    """Time one first frame against a clip of as many frames as a video has."""
    read_first = partial(first_frame.read_first_frame, clip, height=spec.height, width=spec.width)
    first = best_time(read_first, repeats=9)
    plain = best_time(lambda: decord.VideoReader(clip).get_batch(range(spec.num_frames)).asnumpy(), repeats=3)
    whole = best_time(lambda: read_whole_clip(clip, spec), repeats=2)
    yield "first frame, resized, this process", f"{first * 1e3:.1f} ms"
    yield f"{spec.num_frames} frames decoded, not resized", f"{plain * 1e3:.0f} ms = {plain / first:.0f} x"
    name = f"{spec.num_frames} frames as the reference does: decoded, resized, a float tensor"
    yield name, f"{whole * 1e3:.0f} ms = {whole / first:.0f} x"


def reader_rows(clip: str, spec: VideoSpec, folder: Path) -> Iterator[Row]:
    """Time decord, and the reader with its resizing, on files of the same pictures and growing length."""
    base = 0.0
    for minutes in MINUTES:
        path = repeat_clip(clip, folder, minutes)
        megabytes = Path(path).stat().st_size / 2**20
        for reader, work in (
            ("decord", partial(first_frame._read_with_decord, path)),
            ("PyAV, resized", partial(first_frame.read_first_frame, path, height=spec.height, width=spec.width)),
        ):
            read, before = count_read_bytes(work) / 2**20, resident_peak_mb(reset=True)
            took = best_time(work, repeats=9)
            base = took if minutes == MINUTES[0] and reader == "PyAV, resized" else base
            note = f", {took / base:.2f} of the 5 s file" if reader == "PyAV, resized" else ""
            growth = f"peak memory {resident_peak_mb() - before:+.0f} MB{note}"
            label = f"{minutes * 60:.0f} s ({megabytes:.1f} MiB), {reader}"
            yield label, f"{took * 1e3:.1f} ms, {read:.2f} MiB read, {growth}"


def reading_rows(clip: str, spec: VideoSpec, folder: Path) -> Iterator[Row]:
    """Time first frames against whole clips, both readers side by side, and files read in child processes."""
    yield from reference_rows(clip, spec)
    yield from reader_rows(clip, spec, folder)
    pool = ReaderPool(2, spec, 30.0)
    seconds = best_time(lambda: [future.result() for future in [pool.submit(clip) for _ in range(32)]]) / 32
    pool.close()
    yield "first frame, two isolated children", f"{seconds * 1e3:.1f} ms a file"
