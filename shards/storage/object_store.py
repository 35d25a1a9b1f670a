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

from shards.storage.cache import DiskCache

CONNECT_SECONDS, STALL_SECONDS = 10, 30  # seconds to get a connection; seconds without a byte
CLIENT_ERRORS: Mapping[str, tuple[tuple[str, str], ...]] = {  # what a lost connection raises beside OSError
    "https": (("aiohttp", "ClientError"),),
    "http": (("aiohttp", "ClientError"),),
    "s3": (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")),
    "gs": (("aiohttp", "ClientError"), ("gcsfs.retry", "HttpError")),
    "hf": (("huggingface_hub.errors", "HTTPError"),),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a read is tried, and the first pause in seconds; each pause doubles."""

    max_attempts: int = 7
    first_delay: float = 0.5


def client_options(scheme: str) -> dict[str, Any]:
    """Time limits in the words of each client."""
    if scheme in ("http", "https"):
        timeout = import_module("aiohttp").ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS
        )
        return {"client_kwargs": {"timeout": timeout}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": STALL_SECONDS}}
    return {}


class ObjectStore:
    """An object-store prefix."""

    def __init__(self, location: str, *, cache: DiskCache, retry: RetryPolicy = RetryPolicy()) -> None:
        self.location, self.cache, self.retry = location.rstrip("/"), cache, retry
        scheme = location.split("://")[0]
        try:
            options = client_options(scheme)
            self.filesystem, self.root = fsspec.core.url_to_fs(self.location, skip_instance_cache=True, **options)
            client_errors = [getattr(import_module(module), name) for module, name in CLIENT_ERRORS[scheme]]
        except ImportError as error:
            raise ValueError(f"shards={location}: needs pip install 'ti2v-distill[remote]' ({error})") from error
        self.connection_errors: tuple[type[Exception], ...] = (OSError, *client_errors)

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> bytes:
        """See `Place.read`; ConnectionError where all tries fail."""
        key = f"{self.location}/{name}:{start}:{size}"
        cached = None if fresh else self.cache.get(key)
        if cached is not None:
            return cached
        data = self._fetch_with_retries(name, start, size)
        self.cache.put(key, data)
        return data

    def read_into(self, name: str, start: int, buffer: memoryview, *, fresh: bool = False) -> None:
        """See `Place.fill`; ConnectionError where all tries fail."""
        buffer[:] = self.read(name, start, len(buffer), fresh=fresh)

    def _fetch_with_retries(self, name: str, start: int, size: int | None) -> bytes:
        for attempt in range(self.retry.max_attempts):
            try:
                return self._fetch_once(name, start, size)
            except (FileNotFoundError, PermissionError):
                raise
            except self.connection_errors as error:
                delay = self.retry.first_delay * 2**attempt
                reason = f"{self.location}/{name}: {type(error).__name__}: {error}"
                if attempt + 1 == self.retry.max_attempts:
                    raise ConnectionError(f"{reason} (tried {self.retry.max_attempts} times)") from error
                log.warning("%s; again in %.1f s", reason, delay)
                time.sleep(delay)
        raise AssertionError(self.retry)

    def _fetch_once(self, name: str, start: int, size: int | None) -> bytes:
        path = f"{self.root}/{name}"
        if size is None:
            content: bytes = self.filesystem.cat_file(path, start=start) if start else self.filesystem.cat_file(path)
            return content
        data: bytes = self.filesystem.cat_file(path, start=start, end=start + size)
        if len(data) > size:
            raise ValueError(f"{self.location}: the server sends whole files where ranges are asked for")
        if len(data) < size:
            raise OSError(f"{len(data)} bytes came where {size} were asked for")
        return data
