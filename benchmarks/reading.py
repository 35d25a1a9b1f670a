"""Reading first frames: against the reference's way, short files against long ones, both readers side by side."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import decord
import torch

from benchmarks.report import peak
from common.video import VideoSpec
from stage1_encode.media import first_frame
from stage1_encode.media.reader_pool import ReaderPool

MINUTES = (5 / 60, 20 / 60, 1, 2, 4, 10)
Row = tuple[str, str]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Best time of a piece of work, after one run that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def whole_clip(path: str, spec: VideoSpec) -> torch.Tensor:
    """The reference's way: every frame decoded and stretched, then a float tensor."""
    reader = decord.VideoReader(path, width=spec.width, height=spec.height)
    pixels = reader.get_batch(range(min(spec.num_frames, len(reader)))).asnumpy()
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1


def by_av(path: str) -> object:
    """The first frame by PyAV alone."""
    with first_frame._open_container(path) as file:
        return first_frame._read_with_av(file, first_frame._select_video_stream(file))


def bytes_read(work: Callable[[], object]) -> int:
    """Bytes that this process asked the system for during a piece of work (Linux)."""
    counter = Path("/proc/self/io")
    before = int(counter.read_text().split()[1])
    work()
    return int(counter.read_text().split()[1]) - before


def longer(clip: str, folder: Path, minutes: float) -> str:
    """The clip's packets repeated into a file of that many minutes."""
    path = folder / f"{minutes:g}-minutes.mp4"
    with av.open(clip) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        length = max(packet.pts + packet.duration for packet in packets) - min(packet.dts for packet in packets)
        times = [(packet.pts, packet.dts) for packet in packets]
        turns = max(1, round(minutes * 60 / float(length * packets[0].time_base)))
        for turn in range(turns):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.pts, packet.dts, packet.stream = pts + turn * length, dts + turn * length, stream
                target.mux(packet)
    return str(path)


def against_the_reference(clip: str, spec: VideoSpec) -> Iterator[Row]:
    """One first frame against a whole clip of as many frames as a video has."""
    first = seconds(lambda: first_frame.read_first_frame(clip, height=spec.height, width=spec.width), 9)
    plain = seconds(lambda: decord.VideoReader(clip).get_batch(range(spec.num_frames)).asnumpy(), 3)
    whole = seconds(lambda: whole_clip(clip, spec), 2)
    yield "first frame, resized, this process", f"{first * 1e3:.1f} ms"
    yield f"{spec.num_frames} frames decoded, not resized", f"{plain * 1e3:.0f} ms = {plain / first:.0f} x"
    name = f"{spec.num_frames} frames as the reference does: decoded, resized, a float tensor"
    yield name, f"{whole * 1e3:.0f} ms = {whole / first:.0f} x"


def side_by_side(clip: str, spec: VideoSpec, folder: Path) -> Iterator[Row]:
    """Both readers, and the one that is chosen, on files of the same pictures and growing length."""
    base = 0.0
    for minutes in MINUTES:
        path = longer(clip, folder, minutes)
        megabytes = Path(path).stat().st_size / 2**20
        for reader, work in (
            ("decord", lambda path=path: first_frame._read_with_decord(path)),
            ("PyAV", lambda path=path: by_av(path)),
            ("as chosen", lambda path=path: first_frame.read_first_frame(path, height=spec.height, width=spec.width)),
        ):
            read, before = bytes_read(work) / 2**20, peak(reset=True)
            took = seconds(work, 9)
            base = took if minutes == MINUTES[0] and reader == "as chosen" else base
            note = f", {took / base:.2f} of the 5 s file" if reader == "as chosen" else ""
            label = f"{minutes * 60:.0f} s ({megabytes:.1f} MiB), {reader}"
            yield label, f"{took * 1e3:.1f} ms, {read:.2f} MiB read, peak memory {peak() - before:+.0f} MB{note}"


def reading(clip: str, spec: VideoSpec, folder: Path) -> Iterator[Row]:
    """First frames against whole clips; both readers side by side; files read in isolated children."""
    yield from against_the_reference(clip, spec)
    yield from side_by_side(clip, spec, folder)
    children = ReaderPool(2, spec, 30.0)
    isolated = seconds(lambda: [future.result() for future in [children.submit(clip) for _ in range(32)]], 3) / 32
    children.close()
    yield "first frame, two isolated children", f"{isolated * 1e3:.1f} ms a file"
