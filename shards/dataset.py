"""The endless, shuffled, rank-disjoint, exactly resumable stream of records.

A position in the stream is one integer: position // count is its epoch, and the order of an epoch is computed
(`shards/shuffle.py`), so any rank can read any position at any time, and resuming needs nothing but the position.
"""

import threading
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy
from torch import Tensor

from common.video import TEXT_LENGTH
from shards.manifest import (
    MANIFEST_FILE,
    NEGATIVE_FILE,
    Manifest,
    hash_matches,
    parse_manifest,
    parse_negative_embedding,
)
from shards.record import TENSORS_SUFFIX, Batch, Record, collate_records, from_members
from shards.shuffle import shuffled_index
from shards.storage.open import Storage, open_storage, read_verified_file, read_with_retry
from shards.writer import ShardIndex, index_file_name, parse_index

T = TypeVar("T")
R = TypeVar("R")
MAX_CACHED_RECORDS = 200_000  # records whose offsets are held at once, about 0.2 kB each
DEFAULT_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class MemberOffsets:
    """Where the members of one shard lie, in little memory; member 2i and 2i+1 belong to record i."""

    names: tuple[str, ...]
    offsets: "array[int]"
    sizes: "array[int]"
    checksums: "array[int]"  # crc32

    @staticmethod
    def from_index(index: ShardIndex) -> "MemberOffsets":
        """The sidecar's facts without the rest."""
        members = index.members
        return MemberOffsets(
            tuple(member.name for member in members),
            array("q", (member.offset for member in members)),
            array("q", (member.size for member in members)),
            array("I", (member.crc32 for member in members)),
        )


class DataSet:
    """A finished data set, read by record number."""

    def __init__(self, storage: Storage, manifest: Manifest, negative: Tensor) -> None:
        self.storage, self.manifest, self.negative = storage, manifest, negative  # negative (L D)
        self.shard_starts = array("q", chain([0], accumulate(shard.records for shard in manifest.shards)))
        self._offset_cache: OrderedDict[int, MemberOffsets] = OrderedDict()
        self._max_cached_shards = max(
            1, MAX_CACHED_RECORDS * len(manifest.shards) // self.num_records
        )  # shards whose offsets are held
        self._lock = threading.Lock()

    @property
    def num_records(self) -> int:
        """Number of records."""
        return self.shard_starts[-1]

    def read_record(self, index: int) -> Record:
        """Record `index` of 0..records-1; its hash is verified. Safe to call from several threads."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records}")
        shard_index = bisect_right(self.shard_starts, index) - 1
        first_member = 2 * (index - self.shard_starts[shard_index])
        offsets = self._load_offsets(shard_index)
        start = offsets.offsets[first_member]
        stops = [offsets.offsets[i] + offsets.sizes[i] - start for i in (first_member, first_member + 1)]
        member_slices = (slice(0, stops[0]), slice(stops[1] - offsets.sizes[first_member + 1], stops[1]))
        name = self.manifest.shards[shard_index].name

        def read_bytes(fresh: bool) -> memoryview:
            buffer = numpy.empty(stops[1], numpy.uint8).data  # its memory becomes the record's tensors
            self.storage.read_into(name, start, buffer, fresh=fresh)
            return buffer

        def find_damage(data: memoryview) -> list[str]:
            checksums = [zlib.crc32(data[part]) for part in member_slices]
            return [
                offsets.names[first_member + i] for i in (0, 1) if checksums[i] != offsets.checksums[first_member + i]
            ]

        data = read_with_retry(self.storage, name, read_bytes, find_damage)
        return from_members(
            offsets.names[first_member].removesuffix(f".{TENSORS_SUFFIX}"),
            data[member_slices[0]],
            data[member_slices[1]],
        )

    def record_index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order that `seed` decides."""
        return shuffled_index(position, count=self.num_records, seed=seed)

    def _load_offsets(self, shard_index: int) -> MemberOffsets:
        """Member offsets of a shard: read when it is first touched, forgotten when many others were since."""
        with self._lock:
            if shard_index in self._offset_cache:
                self._offset_cache.move_to_end(shard_index)
                return self._offset_cache[shard_index]
        shard = self.manifest.shards[shard_index]
        loaded = MemberOffsets.from_index(
            parse_index(read_verified_file(self.storage, index_file_name(shard.name), shard.index_sha256))
        )
        with self._lock:
            self._offset_cache[shard_index] = loaded
            while len(self._offset_cache) > self._max_cached_shards:
                self._offset_cache.popitem(last=False)
        return loaded


def open_data_set(prefix: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> DataSet:
    """Open the finished data set in a folder or at an object-store prefix; ValueError where there is none.

    Of an object store, up to `cache_bytes` are kept on the local disk.
    """
    storage = open_storage(str(prefix), cache_bytes=cache_bytes)
    try:
        data = storage.read(MANIFEST_FILE, fresh=True)
        if not hash_matches(data):
            data = storage.read(MANIFEST_FILE, fresh=True)
        manifest = parse_manifest(data, storage.location)
        negative = parse_negative_embedding(
            read_verified_file(storage, NEGATIVE_FILE, manifest.negative_sha256), storage.location
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={prefix}: does not exist or is unfinished, run encode again ({error})") from error
    except ConnectionError as error:
        raise ValueError(f"shards={error}") from error
    return DataSet(storage, manifest, negative)


class RecordCollection(Protocol):
    """A data set, or several as one."""

    @property
    def num_records(self) -> int:
        """Number of records."""
        ...

    def read_record(self, index: int) -> Record:
        """Record `index` of 0..records-1."""
        ...

    def record_index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order that `seed` decides."""
        ...


class RecordStream:
    """The endless order of records; `seed` decides it."""

    def __init__(self, data: RecordCollection, *, seed: int, max_text_tokens: int = TEXT_LENGTH) -> None:
        self.data, self.seed, self.max_text_tokens = data, seed, max_text_tokens

    def record_index(self, position: int) -> int:
        """Number of the record at a position."""
        return self.data.record_index(position, seed=self.seed)

    def read_batch(self, positions: Sequence[int]) -> Batch:
        """The records at these positions, collated."""
        return collate_records(
            [self.data.read_record(self.record_index(position)) for position in positions],
            max_text_tokens=self.max_text_tokens,
        )


def prefetch_ordered(load_item: Callable[[T], R], items: Iterable[T], *, depth: int, threads: int) -> Iterator[R]:
    """`load` of each item, in order, up to `depth` of them ahead of the consumer; errors surface in their place."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for item in items:
            pending.append(pool.submit(load_item, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
