"""A bounded folder of bytes read from an object store, shared by all ranks of a machine.

Cached bytes are not trusted: the reader checks every hash, and reads from the store again if one differs.
"""

import hashlib
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

SCANS_PER_FILL = 16  # scans of the folder while it fills once

log = logging.getLogger(__name__)


class DiskCache:
    """Holds up to `max_bytes`, and a sixteenth more per process; what was used longest ago is removed first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._bytes_since_scan = max_bytes  # bytes written since the last scan; so many that the first write scans
        self._lock = threading.Lock()

    def _entry_path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:40]

    def get(self, key: str) -> bytes | None:
        """The bytes stored under `key`; None if there are none or they cannot be read."""
        if not self.max_bytes:  # switched off, which does not empty the folder
            return None
        path = self._entry_path(key)
        with suppress(OSError):
            data = path.read_bytes()
            os.utime(path)  # the time of the last use, which decides what is removed
            return data
        return None

    def put(self, key: str, data: bytes) -> None:
        """Store `data` unless it is too large; a folder that cannot be written only costs time."""
        if len(data) * SCANS_PER_FILL > self.max_bytes:
            return
        path = self._entry_path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._make_room(len(data))
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            log.warning("cache %s: cannot be written, so nothing is cached: %s", self.folder, error)
            with suppress(OSError):
                partial.unlink()

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._bytes_since_scan += size
            if self._bytes_since_scan * SCANS_PER_FILL < self.max_bytes:
                return
            self._bytes_since_scan = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process may just have removed it
                stat = path.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(entry_size for _, entry_size, _ in entries) + size
        for _, entry_size, path in sorted(entries):  # the oldest first
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= entry_size
