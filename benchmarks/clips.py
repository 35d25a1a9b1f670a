"""Distinct H.264 clips of 121 frames made from one: each with another start or brightness, encoded again.

python -m benchmarks.clips SOURCE FOLDER FIRST END      (makes clip FIRST .. END-1; imports no torch)
"""

import subprocess
import sys
from pathlib import Path

import av
import numpy

FRAMES = 121
OPTIONS = {"preset": "superfast", "crf": "23", "threads": "1"}


def read_frames(source: str) -> list[numpy.ndarray]:
    """Return all frames of a clip as planes (3 H / 2, W) of yuv420p."""
    with av.open(source) as file:
        return [frame.to_ndarray(format="yuv420p") for frame in file.decode(video=0)]


def write_clip(path: Path, frames: list[numpy.ndarray], number: int) -> None:
    """Write clip `number`: it starts at frame `number`, wraps around, and is brighter after each round of numbers."""
    height, width = frames[0].shape[0] * 2 // 3, frames[0].shape[1]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24, options=OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(FRAMES):
            planes = frames[(number + index) % len(frames)].copy()
            planes[:height] += numpy.uint8(number // len(frames))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        file.mux(stream.encode())


def start_processes(source: str, folder: Path, count: int, processes: int) -> list["subprocess.Popen[bytes]"]:
    """Start several processes that make clips 0 .. count-1."""
    bounds = [count * part // processes for part in range(processes + 1)]
    command = [sys.executable, "-m", "benchmarks.clips", source, str(folder)]
    spans = zip(bounds, bounds[1:], strict=False)
    return [subprocess.Popen([*command, str(first), str(end)]) for first, end in spans]


def clip_path(folder: Path, number: int) -> Path:
    """Return the path of a clip."""
    return folder / f"{number:04d}.mp4"


if __name__ == "__main__":
    frames = read_frames(sys.argv[1])
    for number in range(int(sys.argv[3]), int(sys.argv[4])):
        write_clip(clip_path(Path(sys.argv[2]), number), frames, number)
