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
from stage1_encode.media.first_frame import Frame, UnreadableError, first_frame
from stage1_encode.media.rows import Row, locate_file

ROOT = Path(__file__).absolute().parents[2]  # from which a child imports this module
MEMORY = 8 * 2**30  # bytes of address space of a child
GRACE = 10.0  # seconds after the time limit in which a child's own alarm has ended it
MOST_WORKERS = 16
START = 60.0  # seconds in which a child is ready


def serve(connection: Connection, height: int, width: int, time_limit: float) -> None:
    """Answer each path that arrives with a frame or a reason, until the other end is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    connection.send_bytes(b"ready")
    while True:
        try:
            path = connection.recv_bytes().decode()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, time_limit)  # its default action ends the process, inside a decoder too
        try:
            frame = first_frame(path, height=height, width=width)
            head, body = json.dumps({"size": frame.size}), frame.pixels.tobytes()
        except UnreadableError as error:
            head, body = json.dumps({"reason": str(error)}), b""
        except MemoryError:
            head, body = json.dumps({"reason": f"needs more than {MEMORY >> 30} GiB of memory"}), b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(head.encode())
        connection.send_bytes(body)


class Child:
    """One child process; used by one thread at a time."""

    def __init__(self, spec: VideoSpec, time_limit: float) -> None:
        self.spec, self.time_limit = spec, time_limit
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = (theirs.fileno(), self.spec.height, self.spec.width, self.time_limit)
        command = [sys.executable, "-m", "stage1_encode.media.reader_pool", *(str(argument) for argument in arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        theirs.close()
        self.connection = Connection(ours.detach())
        self.ready = False

    def _wait_until_ready(self) -> None:
        if self.ready:
            return
        try:
            self.ready = self.connection.poll(START) and self.connection.recv_bytes() == b"ready"
        except (EOFError, ConnectionResetError):
            self.ready = False
        if not self.ready:
            raise RuntimeError(f"the process that reads frames does not start: {self.process.args!r}")

    def read(self, path: str) -> Frame:
        """Read one file's first frame; `UnreadableError` says why it cannot."""
        self._wait_until_ready()
        try:
            self.connection.send_bytes(path.encode())
            if not self.connection.poll(self.time_limit + GRACE):
                raise EOFError
            head = json.loads(self.connection.recv_bytes())
            body = self.connection.recv_bytes()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise UnreadableError(self._bury()) from None
        if "reason" in head:
            raise UnreadableError(head["reason"])
        pixels = numpy.frombuffer(body, numpy.uint8).reshape(self.spec.height, self.spec.width, 3)
        return Frame(pixels, tuple(head["size"]))

    def _bury(self) -> str:
        """Replace a dead or hanging child; why it ended."""
        self.close()
        code = self.process.returncode
        self._start()
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


class Readers:
    """Several children behind one queue."""

    def __init__(self, count: int, spec: VideoSpec, time_limit: float) -> None:
        self.children: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="read")
        for _ in range(count):
            self.children.put(Child(spec, time_limit))

    def submit(self, path: str) -> "Future[Frame]":
        """Begin to read a file."""
        return self.pool.submit(self._read, path)

    def _read(self, path: str) -> Frame:
        child = self.children.get()
        try:
            return child.read(path)
        finally:
            self.children.put(child)

    def close(self) -> None:
        """End all children; files not yet begun are dropped."""
        self.pool.shutdown(cancel_futures=True)
        for _ in range(self.count):
            self.children.get().close()


def default_workers() -> int:
    """Processes that read files, one a CPU core that this process and its neighbours under torchrun share."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min((os.cpu_count() or 1) // neighbours, MOST_WORKERS))


def read_ahead(
    rows: Iterable[Row], readers: Readers, table: Path, *, depth: int
) -> Iterator[tuple[Row, "Future[Frame] | None"]]:
    """Each row with its frame to come, `depth` of them begun ahead; None for a row without a file."""
    begun: deque[tuple[Row, Future[Frame] | None]] = deque()
    for row in rows:
        begun.append((row, readers.submit(locate_file(table, row.path)) if row.path and not row.problem else None))
        if len(begun) > depth:
            yield begun.popleft()
    yield from begun


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):  # the parent is gone, perhaps before this process was ready
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
