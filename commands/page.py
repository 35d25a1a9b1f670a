"""The page of `ui`: a form, the videos, and a history. A `VideoStudio` makes what it shows."""

import html
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Event
from time import monotonic
from typing import Any

import gradio
from gradio.data_classes import FileData

from commands.page_config import VideoRequest
from commands.video_studio import StudioVideo, VideoStudio

Component = Any  # of gradio, whose annotations are not followed
Updates = dict[Component, Any]  # {component: its new value or properties}
MAX_SEED, LABELS = 2**31, ("Student", "Teacher")


class StoppedError(Exception):
    """The visitor has stopped the video."""


@dataclass(frozen=True)
class HistoryEntry:
    """The videos of one request, the student's first."""

    request: VideoRequest
    videos: tuple[StudioVideo, ...]
    seconds: float

    @property
    def text(self) -> str:
        """Prompt, seed, size, time and file as HTML."""
        video, request = self.videos[0], self.request
        segments = f" in {request.segments} segments" if request.segments > 1 else ""
        frames = (video.spec.num_frames - 1) * request.segments + 1
        size = f"{video.spec.width} × {video.spec.height} · {frames} frames{segments}"
        settings = f"seed {request.seed} · {size} · {self.seconds:.1f}\N{NO-BREAK SPACE}s · {video.path.name}"
        return f"<p>{html.escape(request.prompt)}</p><small>{html.escape(settings)}</small>"


def uploaded_path(upload: FileData | None) -> str | None:
    """The path of an uploaded file, or None."""
    return None if upload is None else upload.path


def format_status(text: str, *, is_problem: bool = False) -> str:
    """The status line as HTML."""
    return f'<div class="{"problem" if is_problem else ""}" role="status">{html.escape(text)}</div>'


class VideoPage:
    """The components of the page, and what its buttons do."""

    def __init__(self, studio: VideoStudio) -> None:
        self.studio, self.stops = studio, dict[str, Event]()  # {session: set to stop its video}
        with gradio.Blocks(title="ti2v-distill", analytics_enabled=False) as self.blocks:
            self.history = gradio.State([])
            gradio.HTML(f"<h1>{html.escape(studio.title)}</h1>")
            with gradio.Row():
                with gradio.Column(scale=2, min_width=320):
                    self._build_form()
                with gradio.Column(scale=3, min_width=320):
                    self._build_results()
            self._connect_buttons()

    def _build_form(self) -> None:
        spec, number = self.studio.student.spec, {"precision": 0, "min_width": 90}
        self.prompt = gradio.Textbox(label="Prompt", lines=3, placeholder="What the video shows", autofocus=True)
        self.image = gradio.Image(
            label="First frame (optional)", type="filepath", image_mode=None, sources=["upload"], height=180
        )
        self.image.preprocess = uploaded_path  # the file as it is: the studio reads it as `sample` does, or refuses it
        with gradio.Row():
            self.width = gradio.Number(spec.width, label="Width", step=32, **number)
            self.height = gradio.Number(spec.height, label="Height", step=32, **number)
            self.num_frames = gradio.Number(spec.num_frames, label="Frames", step=4, **number)
        with gradio.Row():
            self.new_seed = gradio.Button("new", size="sm", render=False)
            self.seed = gradio.Number(0, label="Seed", buttons=[self.new_seed], **number)
            self.segments = gradio.Number(1, label="Segments", **number)
        steps = self.studio.config.teacher_steps
        self.with_teacher = gradio.Checkbox(label=f"Teacher beside the student ({steps} guided steps)")
        with gradio.Row():
            self.generate = gradio.Button("Generate", variant="primary", min_width=160)
            self.stop = gradio.Button("Stop", min_width=90)
        self.form = (self.prompt, self.image, self.seed, self.num_frames, self.height, self.width, self.segments,
                     self.with_teacher)  # fmt: skip

    def _build_results(self) -> None:
        self.status = gradio.HTML(
            format_status(f"Videos are kept in {self.studio.out.absolute()}"), elem_classes="status"
        )
        with gradio.Row():
            self.student, self.teacher = (
                gradio.Video(label=label, visible=label == "Student", autoplay=True, loop=True, min_width=200)
                for label in LABELS
            )
        gradio.render(inputs=self.history)(self._show_history)

    def _connect_buttons(self) -> None:
        shown = [self.student, self.teacher, self.status, self.history]
        run = self.generate.click(
            self.make_videos, {*self.form, self.history}, shown, concurrency_limit=1, show_progress_on=self.status
        )
        # `cancels` takes a waiting request out of the queue; a running one ends before its next step
        self.stop.click(self.stop_video, None, self.status, queue=False, cancels=[run])
        self.new_seed.click(lambda: secrets.randbelow(MAX_SEED), None, self.seed, queue=False)

    def _show_history(self, entries: list[HistoryEntry]) -> None:
        if entries:
            gradio.HTML("<h2>History</h2>")
        for entry in reversed(entries):  # the newest first
            with gradio.Row(elem_classes="entry"):
                for label, video in zip(LABELS, entry.videos, strict=False):
                    gradio.Video(video.path, label=label, show_label=False, loop=True, height=140, min_width=140)
                with gradio.Column(min_width=200):
                    gradio.HTML(entry.text)
                    again = gradio.Button("Use these settings", size="sm")
            again.click(partial(self.repeat_settings, entry.request), None, list(self.form), queue=False)

    def repeat_settings(self, request: VideoRequest) -> tuple[object, ...]:
        """The values of the form of an earlier request."""
        return tuple(vars(request).values())

    def stop_video(self, session: gradio.Request) -> Updates:
        """Stop the video that a session waits for."""
        if stop := self.stops.get(str(session.session_hash)):
            stop.set()
        return {self.status: format_status("Stopped.")}

    def stop_all(self) -> None:
        """Stop every session's video, before the program ends."""
        for stop in list(self.stops.values()):
            stop.set()

    def make_videos(
        self,
        values: Mapping[Component, Any],
        session: gradio.Request,
        progress: gradio.Progress = gradio.Progress(),  # noqa: B008  (by this gradio knows that steps are reported)
    ) -> Iterator[Updates]:
        """Yield what changes on the page while the videos of a form are made."""
        request, history = VideoRequest(*(values[component] for component in self.form)), values[self.history]
        stop, began = Event(), monotonic()
        self.stops[str(session.session_hash)] = stop

        def on_step(done: int, total: int) -> None:
            if stop.is_set():
                raise StoppedError
            progress((done, total), desc=LABELS[len(videos)], unit="steps")

        videos = list[StudioVideo]()
        yield {self.student: None, self.teacher: gradio.Video(None, visible=request.with_teacher), self.status: ""}
        try:
            videos.append(self.studio.make_student_video(request, on_step))
            yield self._show_videos(HistoryEntry(request, tuple(videos), monotonic() - began), history)
            if request.with_teacher:
                videos.append(self.studio.make_teacher_video(videos[0], on_step))
                yield self._show_videos(HistoryEntry(request, tuple(videos), monotonic() - began), history)
        except StoppedError:
            yield {self.status: format_status("Stopped.")}
        except (ValueError, OSError) as error:
            yield {self.status: format_status(str(error), is_problem=True)}

    def _show_videos(self, entry: HistoryEntry, history: list[HistoryEntry]) -> Updates:
        """What changes when a video is complete; `history` is that before the request."""
        components = zip((self.student, self.teacher), entry.videos, strict=False)
        is_complete = len(entry.videos) == 1 + entry.request.with_teacher
        status = format_status(f"{entry.videos[0].path} in {entry.seconds:.1f} s") if is_complete else ""
        updates: Updates = {component: video.path for component, video in components}
        return updates | {self.status: status, self.history: [*history, entry]}
