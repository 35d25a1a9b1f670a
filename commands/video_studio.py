"""The models behind the page, loaded once, and the videos that they make, one at a time, as `sample` would."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from commands.page_config import PageConfig, TeacherConfig, VideoRequest
from commands.sample import check_prompt, open_encoder, write_videos
from common.device import pick_device
from common.files import UNFINISHED_FOLDER
from common.video import TEXT_LENGTH, VideoSpec
from shards.record import Record, pad_text
from stage1_encode.decoders.load_decoder import check_decoder
from stage1_encode.generation.condition_encoder import encode_prompt
from stage1_encode.generation.generate import choose_vram
from stage1_encode.media.first_frame import UnreadableError, read_first_frame
from stage2_distill.config import EXACT
from stage2_distill.offload.streamed_blocks import StreamedModule
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import StudentSampler, open_student
from stage2_distill.sampling.student_source import check_model, find_student
from stage2_distill.sampling.teacher_sampler import TeacherSampler, load_teacher, teacher_guidance, teacher_sigmas

OWN_FILES = re.compile(r"video-\d{4,}\D.*")  # what the page writes into its folder
MAX_SEGMENTS = 32
CPU = torch.device("cpu")
StepCallback = Callable[[int, int], None]  # gets the steps done and their number; what it raises stops the video


@dataclass(frozen=True)
class StudioVideo:
    """A video on disk, and the options and size that it was made with."""

    path: Path
    config: SampleConfig
    spec: VideoSpec


@dataclass(frozen=True)
class WatchedSampler:
    """A sampler for one video, in the size of that video, that reports its steps."""

    sampler: StudentSampler | TeacherSampler
    spec: VideoSpec
    segments: int
    on_step: StepCallback

    def __call__(self, records: Sequence[Record], seeds: Sequence[int], segment: int = 0) -> Tensor:
        """Latents (B C T H W) of records; `on_step` is called before each call of the network."""
        steps = len(self.sampler.sigmas)
        done = count(segment * steps)
        hook = self.sampler.net.register_forward_pre_hook(lambda *_: self.on_step(next(done), steps * self.segments))
        try:
            return replace(self.sampler, spec=self.spec)(records, seeds, segment)
        finally:
            hook.remove()

    def move_to(self, device: torch.device) -> None:
        """Move the network to a device; its copy in host memory is shared by all videos."""
        self.sampler.move_to(device)


class VideoStudio:
    """The models and the folder of the page."""

    def __init__(self, config: PageConfig) -> None:
        check_decoder(config.decoder, config.model)
        self.config, self.out, self.lock = config, Path(config.out), Lock()
        sampling = config.sample_config(VideoRequest("any"), self.out / "any.mp4")
        self.vram = choose_vram(config.vram, pick_device(config.device))
        self.facts = find_student(config.checkpoint, config.model).facts
        self.student = open_student(sampling, streams=self.vram == "12gb")
        self.device = self.student.device
        self.encoder = open_encoder(sampling, self.device, self.vram)
        self.teacher: TeacherSampler | None = None  # loaded when it is first asked for

    @property
    def title(self) -> str:
        """The student and its number of steps."""
        return f"Student {self.config.checkpoint}, {len(self.student.sigmas)} steps"

    def make_student_video(self, request: VideoRequest, on_step: StepCallback) -> StudioVideo:
        """Write the student's video; ValueError, and no file, if the request cannot be fulfilled."""
        with self.lock:
            path = self._next_path()
            config = self.config.sample_config(request, path)
            spec = config.video_spec(self.student.spec)
            self._check_size(spec, config.segments)
            check_prompt(config.prompt)
            if self.teacher:
                self.teacher.move_to(CPU)  # one network at a time is on the GPU
            with keep_picture(config) as config:
                return self._write_video(config, WatchedSampler(self.student, spec, config.segments, on_step))

    def make_teacher_video(self, video: StudioVideo, on_step: StepCallback) -> StudioVideo:
        """Write the teacher's video of what a student's video shows, from the same noise."""
        with self.lock:
            self.student.move_to(CPU)
            teacher = self.teacher = self.teacher or self._open_teacher()
            path = video.path.with_name(f"{video.path.stem}-teacher.mp4")
            config = TeacherConfig(
                **(vars(video.config) | {"out": str(path), "precision": EXACT}),
                teacher_steps=self.config.teacher_steps, guidance_scale=teacher.guidance_scale,
                negative_prompt=self.config.negative_prompt,
            )  # fmt: skip
            return self._write_video(config, WatchedSampler(teacher, video.spec, config.segments, on_step))

    def _write_video(self, config: SampleConfig, sampler: WatchedSampler) -> StudioVideo:
        path = Path(config.out)
        try:
            write_videos(config, sampler.spec, sampler, self.encoder, vram=self.vram)
        finally:  # after an error or a stop it holds an incomplete video
            shutil.rmtree(path.with_name(f"{path.name}.{UNFINISHED_FOLDER}"), ignore_errors=True)
        return StudioVideo(path, config, sampler.spec)

    def _open_teacher(self) -> TeacherSampler:
        config, student, streams = self.config, self.student, self.vram == "12gb"
        logging.info("loading the teacher: %s", config.model)
        check_model(config.model, self.facts, ("transformer",))
        text = encode_prompt(self.encoder, config.negative_prompt, keep_text_on_device=self.vram == "full")
        home = CPU if streams else self.device
        net = load_teacher(config.model, self.facts, dtype=student.dtype, device=home)
        streamed = StreamedModule(net, net.blocks, self.device) if streams else None
        scale = teacher_guidance(self.facts, config.guidance_scale)
        sigmas = teacher_sigmas(self.facts, config.teacher_steps)
        rows = min(TEXT_LENGTH, max(config.max_text_tokens, len(text) + 1))  # the negative prompt is a long one
        return TeacherSampler(net, student.spec, sigmas, scale, pad_text(text, rows), student.dtype, streamed)

    def _next_path(self) -> Path:
        names = [path.name for path in self.out.glob("video-*") if OWN_FILES.fullmatch(path.name)]
        last = max((int(re.findall(r"\d+", name)[0]) for name in names), default=0)
        return self.out / f"video-{last + 1:04d}.mp4"

    def _check_size(self, spec: VideoSpec, segments: int) -> None:
        """Raise ValueError for more tokens than the student or Wan was trained with, which may fill the memory."""
        largest = max((self.student.spec, VideoSpec()), key=lambda one: one.num_tokens)
        if spec.num_tokens > largest.num_tokens:
            size, limit = (f"{one.width} x {one.height}, {one.num_frames} frames" for one in (spec, largest))
            raise ValueError(f"width={spec.width}: {size}, is larger than {limit}; give a smaller size or fewer frames")
        if segments > MAX_SEGMENTS:
            raise ValueError(f"segments={segments}: the page makes at most {MAX_SEGMENTS}; use the command sample")


@contextmanager
def keep_picture(config: SampleConfig) -> Iterator[SampleConfig]:
    """Copy the picture of a video beside it, and yield the options that name the copy; after an error it is deleted."""
    if config.image is None:
        yield config
        return
    source, target = Path(config.image), Path(config.out)
    try:  # before it is copied, and under the name that the visitor knows
        read_first_frame(config.image, height=1, width=1)
    except UnreadableError as error:
        raise ValueError(f"image={source.name}: {error}; give a PNG, JPEG or WebP file") from error
    copy = target.with_name(f"{target.stem}-picture{source.suffix.lower()}").absolute()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(copy.unlink, missing_ok=True)
        shutil.copyfile(source, copy)
        yield replace(config, image=str(copy))
        stack.pop_all()  # the video is complete, and the picture stays with it
