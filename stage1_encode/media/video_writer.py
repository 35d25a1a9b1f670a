"""Frames -> H.264 in an mp4 file that browsers play. Shapes: F frames, X Y pixel height and width."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import av
import numpy
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor
from torch.nn import functional

from common.device import copy_async, record_event

H264_OPTIONS = {
    "crf": "16",  # visually lossless
    "preset": "veryfast",  # 85 frames of 1280x704 per second on two cores; slower presets save no space
    "threads": "8",
    # x264's lookahead is not reproducible bit for bit; slices are, for any number of cores
    "x264-params": "b-adapt=0:scenecut=0:rc-lookahead=0:mbtree=0:sliced-threads=1",
}
LUMA_RED, LUMA_BLUE = 0.2126, 0.0722  # weights of BT.709; green has the rest
MAX_PENDING = 4  # calls of `add_frames` that may wait for the encoder


class VideoWriter:
    """Writes an mp4 file in a thread while its frames are computed: completely, or not at all.

    Use it as a context, whose end completes the file. Equal pixels give equal bytes.
    """

    def __init__(self, path: Path, *, fps: int) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        # absolute: FFmpeg takes what stands before a colon, as in out-12:30/a.mp4, for a protocol
        self.file = av.open(str(self.partial.absolute()), "w", format="mp4", options=options)
        self.stream = self.file.add_stream("libx264", rate=fps, options=H264_OPTIONS)
        self.thread, self.pending, self.is_finished = ThreadPoolExecutor(1), deque[Future[None]](), False

    def add_frames(self, frames: Tensor) -> None:
        """Append frames (F X Y 3) uint8, on any device; do not change them afterwards."""
        if not len(frames):
            return
        planes = copy_async(torch.stack([rgb_to_yuv420(frame) for frame in frames]), torch.device("cpu"))
        self.pending.append(self.thread.submit(self._encode_planes, planes, record_event(frames.device)))
        while len(self.pending) > MAX_PENDING:
            self.pending.popleft().result()

    def _encode_planes(self, planes: Tensor, event: torch.cuda.Event | None) -> None:
        if event:
            event.synchronize()
        context = self.stream.codec_context
        if not context.is_open:  # the first frame sets the size
            self.stream.height, self.stream.width = planes.shape[1] * 2 // 3, planes.shape[2]
            self.stream.pix_fmt = "yuv420p"
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in planes.numpy():
            self.file.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))

    def finish_file(self) -> Path:
        """Wait for the encoder, give the file its name and return its path; a second call only returns the path."""
        if self.is_finished:
            return self.path
        try:
            while self.pending:
                self.pending.popleft().result()
            self.file.mux(self.stream.encode())
        finally:
            self.close()
        self.partial.replace(self.path)
        self.is_finished = True
        return self.path

    def close(self) -> None:
        """Release the thread and the file, complete or not."""
        self.thread.shutdown(cancel_futures=True)
        self.file.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.finish_file()
            return
        self.close()
        self.partial.unlink(missing_ok=True)


def write_video(path: Path, pixels: numpy.ndarray, *, fps: int) -> Path:
    """Write a video (F X Y 3) uint8."""
    with VideoWriter(path, fps=fps) as writer:
        writer.add_frames(torch.from_numpy(numpy.ascontiguousarray(pixels)))
    return path


def rgb_to_yuv420(pixels: Tensor) -> Tensor:
    """Convert a frame (X Y 3) uint8 to BT.709 in video range: (3X/2 Y) uint8, luma above the two chroma planes.

    A GPU does this before the encoder, which would convert on the CPU.
    """
    red, green, blue = pixels.float().unbind(2)
    luma = LUMA_RED * red + (1 - LUMA_RED - LUMA_BLUE) * green + LUMA_BLUE * blue
    # video range: luma in 16 to 235, chroma in 16 to 240 around 128
    chroma = torch.stack([(blue - luma) / (1 - LUMA_BLUE), (red - luma) / (1 - LUMA_RED)]) * (112 / 255)
    planes = [luma * (219 / 255) + 16, functional.avg_pool2d(chroma[None], 2)[0] + 128]
    return torch.cat([plane.flatten() for plane in planes]).round().to(torch.uint8).view(-1, pixels.shape[1])
