"""Reading a data set from an object store through fsspec: byte ranges, retries, a bounded local cache.

Needs the extra `remote`. The clients take credentials and endpoints from the environment, as their tools do.
"""

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import fsspec

from shards.storage.cache import DiskCache

CONNECT_SECONDS, STALL_SECONDS = 10, 30  # to get a connection; without a byte
MAX_ATTEMPTS, FIRST_DELAY = 7, 0.5  # of one read; seconds before the second attempt, doubled before each further one
CLIENT_ERRORS: Mapping[str, tuple[tuple[str, str], ...]] = {  # besides OSError
    "https": (("aiohttp", "ClientError"),),
    "http": (("aiohttp", "ClientError"),),
    "s3": (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")),
    "gs": (("aiohttp", "ClientError"), ("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError")),
    "hf": (("huggingface_hub.errors", "HTTPError"),),
}
# A client's error that another attempt meets again: no credentials, no such region, a wrong address.
PERMANENT_KINDS = {"PermissionError", "BotoCoreError", "GoogleAuthError", "InvalidURL", "LocalTokenNotFoundError"}
# The exceptions from them: connections and transfers. A client's class names several of its own by inheritance.
TRANSIENT_KINDS = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseStreamingError", "ChecksumError"),
    *("FlexibleChecksumError", "MetadataRetrievalError", "TransportError"),
}
TRANSIENT_STATUSES = (408, 409, 425, 429)  # timeout, conflict, too early, too many requests; and all from 500 on
LOGIN_HINTS = {
    "s3": "give credentials as for the aws tool, e.g. AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run gcloud auth application-default login",
    "hf": "run hf auth login, or set HF_TOKEN",
}

log = logging.getLogger(__name__)


def client_options(scheme: str) -> dict[str, Any]:
    """Time limits, in the form that the client of a scheme takes; the default of others is finite already."""
    if scheme in ("http", "https"):
        limits = {"total": None, "sock_connect": CONNECT_SECONDS, "sock_read": STALL_SECONDS}
        return {"client_kwargs": {"timeout": import_module("aiohttp").ClientTimeout(**limits)}}
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": STALL_SECONDS}}
    return {}


def response_status(error: Exception) -> int | None:
    """The HTTP status that a client's error carries; None if it has none."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):  # botocore's, which s3fs turns into an OSError
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif response is not None:  # huggingface_hub's
        status = getattr(response, "status_code", None)
    else:  # aiohttp's, gcsfs's
        status = getattr(error, "code" if type(error).__name__ == "HttpError" else "status", None)
    return int(str(status)) if str(status).isdecimal() else None


def is_permanent(error: Exception) -> bool:
    """Whether another attempt would fail in the same way, as without credentials or with a wrong address."""
    status = response_status(error)
    if status is not None:
        return 300 <= status < 500 and status not in TRANSIENT_STATUSES
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & PERMANENT_KINDS) and not kinds & TRANSIENT_KINDS


class ObjectStore:
    """Files by name below an object-store prefix."""

    def __init__(self, location: str, *, cache: DiskCache) -> None:
        self.location, self.cache = location.rstrip("/"), cache
        scheme = location.split("://")[0]
        try:
            options = client_options(scheme)
            self.filesystem, self.root = fsspec.core.url_to_fs(self.location, skip_instance_cache=True, **options)
            client_errors = [getattr(import_module(module), name) for module, name in CLIENT_ERRORS[scheme]]
        except ImportError as error:
            raise ValueError(f"shards={location}: needs pip install 'ti2v-distill[remote]' ({error})") from error
        self.connection_errors: tuple[type[Exception], ...] = (OSError, *client_errors)

    def read(self, name: str, start: int = 0, size: int | None = None, *, fresh: bool = False) -> memoryview:
        """`size` bytes of a file from `start` on (None = all), not cached if `fresh`; ConnectionError if it fails."""
        key = f"{self.location}/{name}:{start}:{size}"
        data = None if fresh else self.cache.get(key)
        if data is None:
            data = self._fetch_with_retries(name, start, size)
            self.cache.put(key, data)
        return memoryview(data)

    def _fetch_with_retries(self, name: str, start: int, size: int | None) -> bytes:
        for attempt in range(MAX_ATTEMPTS):
            try:
                return self._fetch_once(name, start, size)
            except FileNotFoundError:  # another attempt would not help
                raise
            except self.connection_errors as error:
                delay = FIRST_DELAY * 2**attempt
                reason = f"{self.location}/{name}: {type(error).__name__}: {error}"
                if is_permanent(error):
                    scheme = self.location.partition("://")[0].lower()
                    hint = LOGIN_HINTS.get(scheme, "check the address and the rights")
                    raise ConnectionError(f"{reason}; {hint}") from error
                if attempt + 1 == MAX_ATTEMPTS:
                    raise ConnectionError(f"{reason} (tried {MAX_ATTEMPTS} times); check the network") from error
                log.warning("%s; again in %.1f s", reason, delay)
                time.sleep(delay)
        raise AssertionError(MAX_ATTEMPTS)

    def _fetch_once(self, name: str, start: int, size: int | None) -> bytes:
        stop = None if size is None else start + size
        data: bytes = self.filesystem.cat_file(f"{self.root}/{name}", start=start or None, end=stop)
        if size is not None and len(data) > size:
            raise ValueError(
                f"{self.location}: the server sends whole files instead of byte ranges; use one with ranges"
            )
        if size is not None and len(data) < size:
            raise OSError(f"received {len(data)} of {size} bytes")
        return data
