"""First frames read in child processes, so that a decoder that crashes or hangs costs one file and not the run.

A child is a new interpreter, never a fork (a forked decord hangs). It serves one file after the other and is replaced
when it dies. It bounds its own time and memory, so that it ends even when the run itself was killed.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy

from common.video import VideoSpec
from stage1_encode.media.first_frame import FirstFrame, UnreadableError, read_first_frame
from stage1_encode.media.rows import Row, locate_file

PROJECT_ROOT = Path(__file__).absolute().parents[2]  # from which a child imports this module
MEMORY_LIMIT_BYTES = 8 * 2**30  # bytes of address space of a child
GRACE_SECONDS = 10.0  # seconds after the time limit in which a child's own alarm has ended it
MAX_WORKERS = 16
START_TIMEOUT_SECONDS = 60.0  # seconds in which a child is ready


def serve_first_frames(connection: Connection, height: int, width: int, time_limit: float) -> None:
    """Answer each path that arrives with a frame or a reason, until the other end is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    connection.send_bytes(b"ready")
    while True:
        try:
            path = connection.recv_bytes().decode()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, time_limit)  # its default action ends the process, inside a decoder too
        try:
            frame = read_first_frame(path, height=height, width=width)
            header, body = json.dumps({"size": frame.size}), frame.pixels.tobytes()
        except UnreadableError as error:
            header, body = json.dumps({"reason": str(error)}), b""
        except MemoryError:
            header, body = json.dumps({"reason": f"needs more than {MEMORY_LIMIT_BYTES >> 30} GiB of memory"}), b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(header.encode())
        connection.send_bytes(body)


class ReaderProcess:
    """One child process; used by one thread at a time."""

    def __init__(self, spec: VideoSpec, time_limit: float) -> None:
        self.spec, self.time_limit = spec, time_limit
        self._start_process()

    def _start_process(self) -> None:
        parent_socket, child_socket = socket.socketpair()
        arguments = (child_socket.fileno(), self.spec.height, self.spec.width, self.time_limit)
        command = [sys.executable, "-m", "stage1_encode.media.reader_pool", *(str(argument) for argument in arguments)]
        self.process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, pass_fds=(child_socket.fileno(),)
        )
        child_socket.close()
        self.connection = Connection(parent_socket.detach())
        self.ready = False

    def _wait_until_ready(self) -> None:
        if self.ready:
            return
        try:
            self.ready = self.connection.poll(START_TIMEOUT_SECONDS) and self.connection.recv_bytes() == b"ready"
        except (EOFError, ConnectionResetError):
            self.ready = False
        if not self.ready:
            raise RuntimeError(f"the process that reads frames does not start: {self.process.args!r}")

    def read(self, path: str) -> FirstFrame:
        """Read one file's first frame; `UnreadableError` says why it cannot."""
        self._wait_until_ready()
        try:
            self.connection.send_bytes(path.encode())
            if not self.connection.poll(self.time_limit + GRACE_SECONDS):
                raise EOFError
            header = json.loads(self.connection.recv_bytes())
            body = self.connection.recv_bytes()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise UnreadableError(self._restart_process()) from None
        if "reason" in header:
            raise UnreadableError(header["reason"])
        pixels = numpy.frombuffer(body, numpy.uint8).reshape(self.spec.height, self.spec.width, 3)
        return FirstFrame(pixels, tuple(header["size"]))

    def _restart_process(self) -> str:
        """Replace a dead or hanging child; why it ended."""
        self.close()
        code = self.process.returncode
        self._start_process()
        if -code in (signal.SIGALRM, signal.SIGKILL):
            return f"took longer than {self.time_limit:g} s"
        return f"crashes the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def close(self) -> None:
        """End the child."""
        self.connection.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ReaderPool:
    """Several children behind one queue."""

    def __init__(self, count: int, spec: VideoSpec, time_limit: float) -> None:
        self.idle_processes: queue.SimpleQueue[ReaderProcess] = queue.SimpleQueue()
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="read")
        for _ in range(count):
            self.idle_processes.put(ReaderProcess(spec, time_limit))

    def submit(self, path: str) -> "Future[FirstFrame]":
        """Begin to read a file."""
        return self.pool.submit(self._read_file, path)

    def _read_file(self, path: str) -> FirstFrame:
        process = self.idle_processes.get()
        try:
            return process.read(path)
        finally:
            self.idle_processes.put(process)

    def close(self) -> None:
        """End all children; files not yet begun are dropped."""
        self.pool.shutdown(cancel_futures=True)
        for _ in range(self.count):
            self.idle_processes.get().close()


def default_worker_count() -> int:
    """Processes that read files, one a CPU core that this process and its neighbours under torchrun share."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min((os.cpu_count() or 1) // local_processes, MAX_WORKERS))


def read_frames_ahead(
    rows: Iterable[Row], readers: ReaderPool, table: Path, *, depth: int
) -> Iterator[tuple[Row, "Future[FirstFrame] | None"]]:
    """Each row with its frame to come, `depth` of them begun ahead; None for a row without a file."""
    pending: deque[tuple[Row, Future[FirstFrame] | None]] = deque()
    for row in rows:
        pending.append((row, readers.submit(locate_file(table, row.path)) if row.path and not row.problem else None))
        if len(pending) > depth:
            yield pending.popleft()
    yield from pending


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the parent is gone, perhaps before this process was ready
        serve_first_frames(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
