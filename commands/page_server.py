"""The command `ui`: serves the page until it is stopped. The page needs no address but its own."""

import logging
import os
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import fastapi
import gradio
import uvicorn

from commands.page import VideoPage
from commands.page_config import PageConfig
from commands.video_studio import OWN_FILES, VideoStudio
from common.files import UNFINISHED_FOLDER, FolderLock, refuse_foreign_files

Message = MutableMapping[str, Any]  # as ASGI defines it
# browsers then refuse whatever lies elsewhere; gradio writes scripts and styles into the page
CONTENT_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
MAX_PICTURE = "64mb"
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # of the visitor's machine
STYLE = """
.gradio-container {max-width: 1240px !important}
h1 {font-size: 1.25rem; font-weight: 600}
.status {min-height: 56px}
.problem {color: var(--error-text-color); font-weight: 600}
h2 {font-size: 1rem; font-weight: 600; border-top: 1px solid var(--border-color-primary); padding-top: 12px}
.entry small {opacity: .75}
"""


class ContentPolicy:
    """Adds the policy to every answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: object, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer a request, by the protocol of web applications (ASGI)."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class PageServer(uvicorn.Server):
    """Stops the video in progress when the program is told to end, instead of waiting for it."""

    def __init__(self, config: uvicorn.Config, stop_work: Callable[[], None]) -> None:
        super().__init__(config)
        self.stop_work = stop_work

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after SIGINT or SIGTERM."""
        self.stop_work()
        super().handle_exit(sig, frame)


def serve_page(config: PageConfig) -> None:
    """Load the models and serve the page until the program is stopped; ValueError for a port or folder in use."""
    out = Path(config.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each rank would open the port
        raise ValueError("ui: runs in one process; start it without torchrun")
    refuse_foreign_files(out, lambda name: OWN_FILES.fullmatch(name) is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so that uploads are deleted
    with open_listener(config) as listener, FolderLock(out) as lock, TemporaryDirectory() as uploads:
        lock.hold()
        for leftover in out.glob(f"video-*.{UNFINISHED_FOLDER}"):  # of a page that was killed
            shutil.rmtree(leftover)
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = VideoPage(VideoStudio(config))
        server = PageServer(uvicorn.Config(build_app(page, out), log_level="warning", timeout_graceful_shutdown=1),
                            page.stop_all)  # fmt: skip
        host = f"[{config.host}]" if ":" in config.host else config.host
        logging.info("ui: open http://%s:%d in a browser; videos go to %s", host, config.port, out.absolute())
        logging.info("to stop: Ctrl-C; the videos stay")
        server.run(sockets=[listener])


def open_listener(config: PageConfig) -> socket.socket:
    """The socket of the page; ValueError if the port cannot be opened."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]  # Python adds the address
        raise ValueError(
            f"port={config.port}: cannot be opened on {config.host} ({reason}); "
            "give another --port, or a --host of this machine"
        ) from error


def build_app(page: VideoPage, out: Path) -> fastapi.FastAPI:
    """The page as a web application, which may show the files of `out`."""
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), page.blocks, "/", allowed_paths=[str(out.absolute())], footer_links=[],
        run_history=False, show_error=False, max_file_size=MAX_PICTURE, ssr_mode=False, enable_monitoring=False,
        pwa=False, mcp_server=False, theme=gradio.themes.Default(primary_hue="indigo", **FONTS), css=STYLE,
    )  # fmt: skip
    # gradio checks only what it has launched itself: without this, a request could name any file of this machine
    page.blocks.has_launched = True
    app.add_middleware(ContentPolicy)
    return app
