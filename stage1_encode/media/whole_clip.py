"""Video file -> the frames that it shows at a fixed rate, upright, resized and cropped as the first frame is.

Shapes: F frames, X Y pixel height and width.
"""

from collections.abc import Iterator

import av
import numpy

from common.video import VideoSpec
from stage1_encode.media.color import DEFAULT_RULES
from stage1_encode.media.first_frame import DecodedFrame, resize_and_crop, show_frame
from stage1_encode.media.video_frame import UnreadableError, open_video

SLACK_SECONDS = 1e-3  # by which containers round the times of frames


def read_clip(path: str, spec: VideoSpec) -> numpy.ndarray:
    """The first frames (F X Y 3) uint8 of a video, those displayed at 0, 1 / fps and so on after its first frame.

    `UnreadableError` says why the file cannot be read, or that it is too short.
    """
    pictures: list[numpy.ndarray] = []
    try:
        for source, start, end in displayed_frames(path):
            # a frame may be displayed at several of the times, or at none
            times = [number for number in range(len(pictures), spec.num_frames) if start <= number / spec.fps < end]
            if times:
                shown = show_frame(source, DEFAULT_RULES)
                pixels = resize_and_crop(shown.image, height=spec.height, width=spec.width, aspect=shown.aspect)
                pictures += [pixels] * len(times)
            if len(pictures) == spec.num_frames:
                return numpy.stack(pictures)
    except av.FFmpegError as error:
        raise UnreadableError(f"is no readable video: {error.strerror}") from error
    raise UnreadableError(f"shows {len(pictures)} frames at {spec.fps} per second, {spec.num_frames} are needed")


def displayed_frames(path: str) -> Iterator[tuple[DecodedFrame, float, float]]:
    """Yield each frame in order with the seconds, after the first one, from which and up to which it is displayed."""
    with open_video(path) as video:
        aspect, tag = float(video.stream.sample_aspect_ratio or 1), video.stream.codec_context.codec_tag
        last, first_time, start = None, 0.0, 0.0
        for frame in video.file.decode(video.stream):
            if last is None:
                first_time = frame.time or 0.0
            else:
                time = (frame.time or 0.0) - first_time - SLACK_SECONDS
                yield DecodedFrame(last, aspect, tag), start, time
                start = time
            last = frame
        if last is not None:  # its own duration, which not every container states
            rate = video.stream.average_rate
            yield DecodedFrame(last, aspect, tag), start, start + (1 / float(rate) if rate else 0.0) + SLACK_SECONDS
