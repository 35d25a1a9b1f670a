"""First frames read in child processes, so that a decoder that crashes or hangs costs one file and not the run.

A child is a new interpreter: a forked decord hangs, and multiprocessing's spawn would run the main script again. It
serves one file after the other, is replaced when it dies, and limits its own time and memory, so that it ends even if
the run was killed.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy

from common.video import FrameSize, VideoSpec
from stage1_encode.media.color import DEFAULT_RULES, ColorRules
from stage1_encode.media.first_frame import FirstFrame, UnreadableError, read_displayed_shape, read_first_frame
from stage1_encode.media.rows import Row, locate_file

T = TypeVar("T")
PROJECT_ROOT = Path(__file__).absolute().parents[2]  # working directory of a child, so that it can import this module
MEMORY_LIMIT_BYTES = 8 * 2**30  # address space of a child
GRACE_SECONDS = 10.0  # after the time limit; by then the child's own alarm has ended it
MAX_WORKERS = 16
START_TIMEOUT_SECONDS = 60.0


def serve_first_frames(connection: Connection, time_limit: float, rules: ColorRules = DEFAULT_RULES) -> None:
    """Answer each request that arrives with a JSON header and pixels (H W 3), until the other end is closed.

    A request is a JSON list of a path and the height and width of the frame, or of a path alone for its shape only.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its children
    connection.send_bytes(b"ready")
    while True:
        path, *size = json.loads(connection.recv_bytes())
        signal.setitimer(signal.ITIMER_REAL, time_limit)  # its default action ends the process, inside a decoder too
        header, body = dict[str, object](), b""
        try:
            if size:
                frame = read_first_frame(path, height=size[0], width=size[1], rules=rules)
                header |= {"size": frame.size, "color": frame.color, "aspect": frame.aspect}
                body = frame.pixels.tobytes()
            else:
                header["size"] = read_displayed_shape(path)
        except UnreadableError as error:
            header["reason"] = str(error)
        except MemoryError:
            header["reason"] = f"needs more than {MEMORY_LIMIT_BYTES >> 30} GiB of memory"
        signal.setitimer(signal.ITIMER_REAL, 0)
        # JSON and bytes, not pickle: a file that takes over the decoder must not take over the run
        connection.send_bytes(json.dumps(header).encode())
        connection.send_bytes(body)


class ReaderProcess:
    """A child process that reads first frames; used by one thread at a time."""

    def __init__(self, time_limit: float, rules: ColorRules = DEFAULT_RULES) -> None:
        self.time_limit, self.rules = time_limit, rules
        self._start_process()

    def _start_process(self) -> None:
        self.connection, child_end = Pipe()
        arguments = (child_end.fileno(), self.time_limit, *astuple(self.rules))
        command = [sys.executable, "-m", "stage1_encode.media.reader_pool", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, pass_fds=(child_end.fileno(),)
        )
        child_end.close()  # otherwise a dead child would not close the connection
        self.is_ready = False

    def _wait_until_ready(self) -> None:
        with contextlib.suppress(EOFError, ConnectionResetError):
            self.is_ready = self.is_ready or (
                self.connection.poll(START_TIMEOUT_SECONDS) and self.connection.recv_bytes() == b"ready"
            )
        if not self.is_ready:
            raise ChildProcessError(
                f"the process that reads frames does not start; run {sys.executable} -m {__name__} to see why"
            )

    def read(self, path: str, size: FrameSize) -> FirstFrame:
        """Read one file's first frame; `UnreadableError` says why it cannot."""
        header, body = self._ask(path, size.height, size.width)
        pixels = numpy.frombuffer(body, numpy.uint8).reshape(size.height, size.width, 3)
        return FirstFrame(pixels, tuple(header["size"]), header["color"], header["aspect"])

    def read_shape(self, path: str) -> tuple[int, int]:
        """(height, width) at which one file is displayed; `UnreadableError` says why it cannot be read."""
        header, _ = self._ask(path)
        return tuple(header["size"])

    def _ask(self, *request: object) -> tuple[dict[str, Any], bytes]:
        """The answer of the child to a request, see `serve_first_frames`."""
        self._wait_until_ready()  # the time limit does not include the start
        try:
            self.connection.send_bytes(json.dumps(request).encode())
            if not self.connection.poll(self.time_limit + GRACE_SECONDS):
                raise EOFError
            header = json.loads(self.connection.recv_bytes())
            body = self.connection.recv_bytes()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise UnreadableError(self._restart_process()) from None
        if "reason" in header:
            raise UnreadableError(header["reason"])
        return header, body

    def _restart_process(self) -> str:
        """Restart a crashed or hanging child and return the cause."""
        self.close()
        code = self.process.returncode
        self._start_process()
        if -code in (signal.SIGALRM, signal.SIGKILL):  # its own alarm, or `close` after the grace time
            return f"took longer than {self.time_limit:g} s"
        return f"crashes the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def close(self) -> None:
        """End the child: it stops when its connection closes, or is killed after a second."""
        self.connection.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ReaderPool:
    """Several reader processes behind one queue."""

    def __init__(self, count: int, spec: VideoSpec, time_limit: float, rules: ColorRules = DEFAULT_RULES) -> None:
        self.count, self.frame_size = count, spec.frame_size
        self.idle_processes: queue.SimpleQueue[ReaderProcess] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="read")
        for _ in range(count):
            self.idle_processes.put(ReaderProcess(time_limit, rules))

    def submit(self, path: str, size: FrameSize | None = None) -> "Future[FirstFrame]":
        """Begin to read the first frame of a file, in the pool's size if none is given."""
        return self.threads.submit(self._with_process, lambda process: process.read(path, size or self.frame_size))

    def submit_shape(self, path: str) -> "Future[tuple[int, int]]":
        """Begin to read the (height, width) at which a file is displayed."""
        return self.threads.submit(self._with_process, lambda process: process.read_shape(path))

    def _with_process(self, task: Callable[[ReaderProcess], T]) -> T:
        process = self.idle_processes.get()
        try:
            return task(process)
        finally:
            self.idle_processes.put(process)

    def close(self) -> None:
        """End all children; files that are not yet begun are dropped."""
        self.threads.shutdown(cancel_futures=True)
        for _ in range(self.count):
            self.idle_processes.get().close()  # after the shutdown, all of them are idle


def default_worker_count() -> int:
    """One reader process per CPU core, at most 16, if torchrun's ranks on this machine share the cores."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min((os.cpu_count() or 1) // local_processes, MAX_WORKERS))


def read_frames_ahead(
    rows: Iterable[Row], readers: ReaderPool, csv_path: Path, *, depth: int, base_folder: str | None = None
) -> Iterator["Future[FirstFrame] | None"]:
    """Yield each row's frame as a future, or None for a row without a usable file; `depth` rows are read ahead."""
    pending: deque[Future[FirstFrame] | None] = deque()
    for row in rows:
        is_readable = bool(row.path) and not row.problem
        path = locate_file(csv_path, row.path, base_folder) if is_readable else ""
        pending.append(readers.submit(path, row.video_size) if is_readable else None)
        if len(pending) > depth:
            yield pending.popleft()
    yield from pending


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone, perhaps before this process was ready
        descriptor, time_limit, *rules = sys.argv[1:]
        serve_first_frames(Connection(int(descriptor)), float(time_limit), ColorRules(*rules))
