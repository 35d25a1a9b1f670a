"""The command `ui`: its page in a browser, and what it refuses."""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

import cli
from tests.browser import BROWSER, BrowserTab, open_browser

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")
ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples" / "nano" / "images" / "01.png"
PROMPT, STEPS = "a red circle moves <b>right</b>", 4000  # enough for a stop to come in time
SET_PROMPT = """(() => {const box = document.querySelector('textarea');
Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(box, %s);
box.dispatchEvent(new Event('input', {bubbles: true}))})()"""
PRESS = "[...document.querySelectorAll('button')].find(one => one.innerText == '%s').click()"
PLAYING = """[...document.querySelectorAll('video')].some(one => one.readyState >= 2 && one.currentTime > 0)"""
STATUS = "document.querySelector('[role=status]')?.innerText"


@dataclass(frozen=True)
class ServedPage:
    """A page that is being served."""

    address: str
    out: Path
    process: subprocess.Popen[str]
    uploads: Path  # TMPDIR of the process


@pytest.fixture(scope="module")
def options(model: Path, student_run: Path) -> list[str]:
    """The options of `ui` for a short run."""
    flags = {"checkpoint": student_run, "model": model, "dtype": "float32", "device": "cpu", "teacher-steps": STEPS}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def page(options: list[str], tmp_path: Path) -> Iterator[ServedPage]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uploads = tmp_path / "temporary"
    uploads.mkdir()
    (tmp_path / "videos" / "video-0007.mp4.unfinished").mkdir(parents=True)  # of a page that was killed
    command = [sys.executable, str(ROOT / "cli.py"), "ui", *options, "--out", "videos", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(uploads), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("ui: "))
            assert line == f"ui: open http://127.0.0.1:{port} in a browser; videos go to {tmp_path / 'videos'}\n"
            yield ServedPage(f"http://127.0.0.1:{port}", tmp_path / "videos", process, uploads)
        finally:
            process.kill()


async def play(tab: BrowserTab, page: ServedPage, picture: Path) -> None:
    """A visitor makes a video, asks for one that is too large, and stops a third."""
    await tab.open(page.address, width=1280)
    await tab.wait("document.querySelector('textarea') && document.querySelector('input[type=file]')")
    await tab.value(SET_PROMPT % json.dumps(PROMPT))
    await tab.choose_file("input[type=file]", picture)
    await tab.wait("[...document.images].some(one => one.naturalWidth == 96)")
    await tab.value(PRESS % "Generate")
    await tab.wait(PLAYING)
    assert await tab.value("document.querySelector('video').videoWidth") == 64
    await tab.wait("document.querySelector('.entry')")
    entry = await tab.value("document.querySelector('.entry').innerText")
    assert PROMPT in entry and "seed 0 · 64 × 64 · 9 frames" in entry
    # a request that cannot be fulfilled
    await tab.value(SET_PROMPT % json.dumps(" "))
    await tab.value(PRESS % "Generate")
    await tab.wait(f"{STATUS}?.startsWith('prompt is empty')")
    # a stop while the teacher computes
    await tab.value(PRESS % "Use these settings")
    await tab.wait(f"document.querySelector('textarea').value == {json.dumps(PROMPT)}")
    await tab.value("document.querySelector('input[type=checkbox]').click()")
    await tab.value(PRESS % "Generate")
    await tab.wait("document.querySelectorAll('.entry').length == 2")
    await tab.value(PRESS % "Stop")
    await tab.wait(f"{STATUS} == 'Stopped.'")
    for width in (390, 1280):
        await tab.resize(width, 1000)
        assert await tab.value("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_a_visitor_makes_and_stops_videos(page: ServedPage, tmp_path: Path) -> None:
    async def visit() -> BrowserTab:
        async with open_browser(tmp_path / "profile") as tab:
            await play(tab, page, PICTURE)
        return tab

    tab = asyncio.run(visit())
    secret = tmp_path / "secret.png"
    shutil.copyfile(PICTURE, secret)
    assert '"success":false' in asyncio.run(ask_for_file(page.address, secret))
    assert list(page.uploads.rglob("secret*")) == []
    assert tab.problems == []
    hosts = {re.split("[/:]+", request)[1] for request in tab.requests if request.startswith("http")}
    assert hosts == {"127.0.0.1"}
    made = sorted(path.name for path in page.out.iterdir())
    parts = ("-picture.png", ".mp4", ".mp4.yaml", ".zarr")
    assert made == ["owner.lock", *(f"video-000{number}{part}" for number in (1, 2) for part in parts)]
    assert list(page.uploads.glob("tmp*/**/*.png"))
    began = time.monotonic()
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(timeout=30) == 130
    assert time.monotonic() - began < 20
    assert list(page.uploads.glob("tmp*/**/*.png")) == []
    assert not (page.out / "owner.lock").exists()


async def ask_for_file(address: str, path: Path) -> str:
    """Answer to a request, made without the page, for a video that begins with a file of this machine."""
    form = {"Prompt": "a", "Seed": 0, "Frames": 9, "Height": 64, "Width": 64, "Segments": 1}
    async with aiohttp.ClientSession(address) as session:
        config = await (await session.get("/config")).json()
        labels = {one["id"]: one["props"].get("label") for one in config["components"]}
        (function,) = (one for one in config["dependencies"] if one["api_name"] == "make_videos")
        data = [form.get(labels[one], False) for one in function["inputs"]]
        picture = [labels[one] for one in function["inputs"]].index("First frame (optional)")
        data[picture] = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        request = {"data": data, "fn_index": function["id"], "session_hash": "another"}
        assert (await session.post("/gradio_api/queue/join", json=request)).status == 200
        async with session.get("/gradio_api/queue/data", params={"session_hash": "another"}) as events:
            async for line in events.content:
                if b"process_completed" in line:
                    return line.decode()
    raise AssertionError("the request was not answered")


def refusal(*words: object) -> str:
    """What `ui` says to options that it refuses."""
    with pytest.raises(ValueError, match=r".+") as caught:
        cli.cli.main(["ui", *map(str, words)], standalone_mode=False)
    return str(caught.value)


def test_refusals(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = tmp_path / "videos"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(*options, "--out", out, "--port", port)
        assert message.startswith(f"port={port}: cannot be opened on 127.0.0.1 (Address already in use); ")
    assert "port=0: must be between 1 and 65535" in refusal(*options, "--out", out, "--port", 0)
    assert "cannot be opened on nowhere.invalid" in refusal(*options, "--out", out, "--host", "nowhere.invalid")
    assert not out.exists()
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert "holds other files (letter.txt)" in refusal(*options, "--out", out)
    (out / "letter.txt").rename(out / "video-0001.mp4")  # the page's own
    assert "no checkpoint" in refusal(*options, "--checkpoint", tmp_path, "--out", out, "--port", port)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(*options) == "ui: runs in one process; start it without torchrun"
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert refusal(*options) == "ui: gradio is not installed; pip install 'ti2v-distill[ui]'"
