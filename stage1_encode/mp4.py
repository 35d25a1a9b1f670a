"""Frames -> H.264 in an mp4 file that plays in a browser. Shapes: F frames, X Y pixel height and width."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import av
import numpy
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor

from common.device import begin_copy, mark

H264 = {
    "crf": "16",  # visually lossless
    "preset": "veryfast",  # 85 frames of 1280x704 a second on two cores, at the size of slower ones
    "threads": "8",
    # its lookahead does not repeat itself bit for bit; slices do, for any number of cores
    "x264-params": "b-adapt=0:scenecut=0:rc-lookahead=0:mbtree=0:sliced-threads=1",
}
AHEAD = 4  # pieces that may wait for the encoder


class Film:
    """An mp4 file that is written by a thread while its frames are being made; whole or not at all.

    The same pixels give the same bytes. Use it as a context: leaving it completes the file.
    """

    def __init__(self, path: Path, *, fps: int) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        self.file = av.open(str(self.partial), "w", format="mp4", options=options)
        self.stream = self.file.add_stream("libx264", rate=fps, options=H264)
        self.thread, self.waiting, self.done = ThreadPoolExecutor(1), deque[Future[None]](), False

    def add(self, frames: Tensor) -> None:
        """Append frames (F X Y 3) uint8, on any device; they must not be changed after."""
        pixels = begin_copy(frames, torch.device("cpu"))
        self.waiting.append(self.thread.submit(self._encode, pixels, mark(frames.device)))
        while len(self.waiting) > AHEAD:
            self.waiting.popleft().result()

    def _encode(self, pixels: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready:
            ready.synchronize()
        context = self.stream.codec_context
        if not context.is_open:
            self.stream.height, self.stream.width, self.stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in to_frames(pixels.numpy()):
            self.file.mux(self.stream.encode(frame))

    def finish(self) -> Path:
        """Wait for the encoder and give the file its name; asked again, nothing more is done."""
        if self.done:
            return self.path
        try:
            while self.waiting:
                self.waiting.popleft().result()
            self.file.mux(self.stream.encode())
        finally:
            self.close()
        self.partial.replace(self.path)
        self.done = True
        return self.path

    def close(self) -> None:
        """Let go of the thread and of the file, complete or not."""
        self.thread.shutdown(cancel_futures=True)
        self.file.close()

    def __enter__(self) -> "Film":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
            return
        self.close()
        self.partial.unlink(missing_ok=True)


def write_video(path: Path, pixels: numpy.ndarray, *, fps: int) -> Path:
    """Write a video (F X Y 3) uint8."""
    with Film(path, fps=fps) as film:
        film.add(torch.from_numpy(numpy.ascontiguousarray(pixels)))
    return path


def to_frames(pixels: numpy.ndarray) -> Iterator[av.VideoFrame]:
    """Frames in the colours that the file says it has: untagged or BT.601 ones are shown wrong."""
    for picture in pixels:
        rgb = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(picture), format="rgb24")
        yield rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
