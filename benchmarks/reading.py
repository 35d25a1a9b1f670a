"""Reading first frames: against the reference's way, short files against long ones, both readers side by side."""

import time
from collections.abc import Callable
from pathlib import Path

import av
import decord
import torch

from common.video import VideoSpec
from stage1_encode import frames
from stage1_encode.isolate import Readers

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
    with frames._open(path) as file:
        return frames._read_with_av(file, frames._video_stream(file))


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


def reading(clip: str, spec: VideoSpec, folder: Path) -> list[Row]:
    """First frames against whole clips; short files against long ones; both readers side by side."""
    size = {"height": spec.height, "width": spec.width}
    first = seconds(lambda: frames.first_frame(clip, **size))
    plain = seconds(lambda: decord.VideoReader(clip).get_batch(range(spec.num_frames)).asnumpy(), 3)
    whole = seconds(lambda: whole_clip(clip, spec), 2)
    rows = [
        ("first frame, resized, this process", f"{first * 1e3:.1f} ms"),
        ("whole clip, decoded only", f"{plain * 1e3:.0f} ms = {plain / first:.0f} x"),
        ("whole clip as the reference does, to a float tensor", f"{whole * 1e3:.0f} ms = {whole / first:.0f} x"),
    ]
    files = {"5 s": longer(clip, folder, 5 / 60), "10 min": longer(clip, folder, 10)}
    for name, path in files.items():
        megabytes = Path(path).stat().st_size / 2**20
        for reader, work in (
            ("decord", lambda path=path: frames._read_with_decord(path)),
            ("PyAV", lambda path=path: by_av(path)),
            ("as chosen", lambda path=path: frames.first_frame(path, **size)),
        ):
            read = bytes_read(work) / 2**20
            label = f"{name} ({megabytes:.1f} MiB), {reader}"
            rows.append((label, f"{seconds(work, 3) * 1e3:.1f} ms, {read:.2f} MiB read"))
    children = Readers(2, spec, 30.0)
    isolated = seconds(lambda: [future.result() for future in [children.submit(clip) for _ in range(16)]], 2) / 16
    children.close()
    return [*rows, ("first frame, two isolated children", f"{isolated * 1e3:.1f} ms a file")]
