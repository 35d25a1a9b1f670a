"""A bounded folder of bytes read from an object store, shared by all ranks of a machine.

What is kept is not trusted: the reader checks every hash, and asks the store again where one differs.
"""

import hashlib
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

SCANS_PER_FILL = 16  # times that the folder is looked through while it fills once

log = logging.getLogger(__name__)


class DiskCache:
    """Holds up to `limit` bytes (and a sixteenth more for each process); what was used longest ago goes first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._bytes_since_scan = max_bytes  # bytes written since the folder was last looked through: unknown at first
        self._lock = threading.Lock()

    def _entry_path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:40]

    def get(self, key: str) -> bytes | None:
        """The bytes kept under `key`; None where there are none, or none that can be read."""
        path = self._entry_path(key)
        if not self.max_bytes:
            return None
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, as far as it fits; a folder that cannot be written costs time but stops nothing."""
        if len(data) * SCANS_PER_FILL > self.max_bytes:
            return
        path = self._entry_path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._make_room(len(data))
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            log.warning("cache %s: nothing kept: %s", self.folder, error)
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
            try:
                entries.append((path.stat(), path))
            except FileNotFoundError:
                continue  # another process has just removed it
        total = sum(stat.st_size for stat, _ in entries) + size
        for stat, path in sorted(entries, key=lambda pair: pair[0].st_mtime_ns):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size
