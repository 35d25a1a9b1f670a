"""Reading a data set from an object store through fsspec: ranges, retries, a bounded local cache.

Needs the extra `remote`; the clients take credentials and endpoints from the environment, as their tools do.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import fsspec

from shards.cache import Cache

CONNECT, STALL = 10, 30  # seconds to get a connection; seconds without a byte
CLIENT_ERRORS: Mapping[str, tuple[tuple[str, str], ...]] = {  # what a lost connection raises beside OSError
    "https": (("aiohttp", "ClientError"),),
    "http": (("aiohttp", "ClientError"),),
    "s3": (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")),
    "gs": (("aiohttp", "ClientError"), ("gcsfs.retry", "HttpError")),
    "hf": (("huggingface_hub.errors", "HTTPError"),),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """How often a read is tried, and the first pause in seconds; each pause doubles."""

    tries: int = 7
    pause: float = 0.5


def client_options(scheme: str) -> dict[str, Any]:
    """Time limits in the words of each client."""
    if scheme in ("http", "https"):
        timeout = import_module("aiohttp").ClientTimeout(total=None, sock_connect=CONNECT, sock_read=STALL)
        return {"client_kwargs": {"timeout": timeout}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": CONNECT, "read_timeout": STALL}}
    return {}


class Remote:
    """An object-store prefix."""

    def __init__(self, where: str, *, cache: Cache, retry: Retry = Retry()) -> None:
        self.where, self.cache, self.retry = where.rstrip("/"), cache, retry
        scheme = where.split("://")[0]
        try:
            options = client_options(scheme)
            self.files, self.root = fsspec.core.url_to_fs(self.where, skip_instance_cache=True, **options)
            lost = [getattr(import_module(module), name) for module, name in CLIENT_ERRORS[scheme]]
        except ImportError as error:
            raise ValueError(f"shards={where}: needs pip install 'ti2v-distill[remote]' ({error})") from error
        self.lost: tuple[type[Exception], ...] = (OSError, *lost)

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """See `Place.read`; ConnectionError where all tries fail."""
        key = f"{self.where}/{name}:{start}:{size}"
        kept = None if fresh else self.cache.get(key)
        if kept is not None:
            return kept
        data = self._fetch(name, start, size)
        self.cache.put(key, data)
        return data

    def fill(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """See `Place.fill`; ConnectionError where all tries fail."""
        buffer[:] = self.read(name, start, len(buffer), fresh=fresh)

    def _fetch(self, name: str, start: int, size: int | None) -> bytes:
        for number in range(self.retry.tries):
            try:
                return self._fetch_once(name, start, size)
            except (FileNotFoundError, PermissionError):
                raise
            except self.lost as error:
                pause = self.retry.pause * 2**number
                reason = f"{self.where}/{name}: {type(error).__name__}: {error}"
                if number + 1 == self.retry.tries:
                    raise ConnectionError(f"{reason} (tried {self.retry.tries} times)") from error
                log.warning("%s; again in %.1f s", reason, pause)
                time.sleep(pause)
        raise AssertionError(self.retry)

    def _fetch_once(self, name: str, start: int, size: int | None) -> bytes:
        path = f"{self.root}/{name}"
        if size is None:
            whole: bytes = self.files.cat_file(path, start=start) if start else self.files.cat_file(path)
            return whole
        data: bytes = self.files.cat_file(path, start=start, end=start + size)
        if len(data) > size:
            raise ValueError(f"{self.where}: the server sends whole files where ranges are asked for")
        if len(data) < size:
            raise OSError(f"{len(data)} bytes came where {size} were asked for")
        return data
