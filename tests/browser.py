"""A headless Chromium for tests, driven by the Chrome DevTools Protocol over a web socket."""

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), "")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --autoplay-policy=no-user-gesture-required "
    "--remote-debugging-port=0"
)
POLL_SECONDS = 0.1


class BrowserTab:
    """One tab; `requests` holds the addresses that its pages have asked for, `problems` what they complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.number = socket, 0
        self.requests, self.problems = list[str](), list[str]()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a method of the protocol."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=30)).data)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note_event(message.get("method"), message.get("params", {}))

    def _note_event(self, method: str, facts: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(facts["exceptionDetails"].get("exception", {}).get("description", str(facts)))

    async def open(self, address: str, *, width: int, height: int = 1000) -> None:
        """Load a page in a window of this size."""
        for domain in ("Page", "Network", "Runtime", "DOM"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        await self.call("Page.navigate", url=address)

    async def resize(self, width: int, height: int) -> None:
        """Give the page another size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)

    async def value(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def wait(self, expression: str, seconds: float = 30) -> None:
        """Return once a JavaScript expression is true."""
        for _ in range(round(seconds / POLL_SECONDS)):
            if await self.value(f"Boolean({expression})"):
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(
            f"{expression} is not true after {seconds} s: {await self.value('document.body.innerText')}"
        )

    async def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into a file input."""
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write the window as a PNG, or the whole page."""
        result = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(result["data"]))


@asynccontextmanager
async def open_browser(profile: Path) -> AsyncIterator[BrowserTab]:
    """A tab of a new browser with an empty profile."""
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(300):
            if port_file.is_file() and len(lines := port_file.read_text().splitlines()) == 2:
                break
            assert process.poll() is None, "the browser has ended"
            await asyncio.sleep(POLL_SECONDS)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tab = next(one for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield BrowserTab(socket)
    finally:
        process.terminate()
        process.wait(timeout=20)
