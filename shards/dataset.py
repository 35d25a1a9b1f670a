"""A finished data set, read by record number, and the prefetching of an ordered sequence.

A position in the endless order of records is one integer: position // num_records is its epoch, and the order of each
epoch is computed (`shards/shuffle.py`). Any rank can therefore read any position at any time, and a run resumes from
its position alone.

A shard holds records of one size, so the records of a size lie in ranges of numbers (`SizeGroup`).
"""

import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, compress, pairwise
from pathlib import Path
from typing import TypeVar

import numpy
from torch import Tensor

from common.video import VideoSpec
from shards.manifest import Manifest, ShardInfo, load_manifest, load_negative_embedding
from shards.record import TENSORS_SUFFIX, Record, from_members, schema_problems
from shards.shuffle import permute_index
from shards.storage.open import Storage, open_storage, read_verified_file, read_with_retry
from shards.writer import ShardIndex, index_file_name, parse_index

T = TypeVar("T")
R = TypeVar("R")
MAX_CACHED_RECORDS = 200_000  # records whose offsets are in memory at once, about 0.2 kB each
DEFAULT_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class SizeGroup:
    """The records of one size."""

    spec: VideoSpec
    ranges: tuple[range, ...]  # of record numbers, ascending; none is empty

    @cached_property
    def _range_ends(self) -> "array[int]":
        """For each range, how many records it and those before it have."""
        return array("q", accumulate(map(len, self.ranges)))

    @property
    def num_records(self) -> int:
        """Number of records of this size, at least 1."""
        return self._range_ends[-1]

    def record_index(self, index: int) -> int:
        """Number in the data set of record `index` of 0..num_records-1 of this size; IndexError for another index."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records} of {self.spec}")
        position = bisect_right(self._range_ends, index)
        return self.ranges[position][index - self._range_ends[position]]  # counted from the range's end


class DataSet:
    """A finished data set, read by record number."""

    def __init__(self, storage: Storage, manifest: Manifest, negative: Tensor) -> None:
        self.storage, self.manifest, self.negative = storage, manifest, negative  # negative (L D)
        self.num_records, self.digests = manifest.records, (manifest.content_digest,)
        self._first_records = array("q", accumulate((shard.records for shard in manifest.shards), initial=0))
        max_cached_shards = max(1, MAX_CACHED_RECORDS * len(manifest.shards) // self.num_records)
        self._load_offsets = lru_cache(max_cached_shards)(self._read_offsets)  # safe for threads

    @cached_property
    def size_groups(self) -> tuple[SizeGroup, ...]:
        """The records by size, in the order of `manifest.sizes`."""
        ranges: dict[VideoSpec, list[range]] = {spec: [] for spec in self.manifest.sizes}
        for shard, (first, end) in zip(self.manifest.shards, pairwise(self._first_records), strict=True):
            if first == end:
                continue
            own = ranges[self.manifest.shard_spec(shard)]
            if own and own[-1].stop == first:
                first = own.pop().start
            own.append(range(first, end))
        return tuple(SizeGroup(spec, tuple(own)) for spec, own in ranges.items())

    @property
    def size_shares(self) -> dict[VideoSpec, float]:
        """The share of each size in the records that are read."""
        return {group.spec: group.num_records / self.num_records for group in self.size_groups}

    def record_spec(self, index: int) -> VideoSpec:
        """Size and frame rate of record `index` of 0..num_records-1, without reading it."""
        return self.manifest.shard_spec(self.manifest.shards[bisect_right(self._first_records, index) - 1])

    def read_record(self, index: int) -> Record:
        """Record `index` of 0..num_records-1, for any thread; IndexError, or ValueError naming damaged members."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records}")
        shard_index = bisect_right(self._first_records, index) - 1
        first = 2 * (index - self._first_records[shard_index])
        shard, (member_names, offsets) = self.manifest.shards[shard_index], self._load_offsets(shard_index)
        start, tensors_size, tensors_crc = offsets[first].tolist()
        metadata_start, metadata_size, metadata_crc = offsets[first + 1].tolist()
        # One read covers both members and the tar header between them.
        gap_end, size = metadata_start - start, metadata_start + metadata_size - start

        def damaged_members(data: memoryview) -> list[str]:
            damaged = zlib.crc32(data[:tensors_size]) != tensors_crc, zlib.crc32(data[gap_end:]) != metadata_crc
            return list(compress(member_names[first : first + 2], damaged))

        data = read_with_retry(self.storage, damaged_members, shard.name, start, size)
        return self._parse_record(shard, member_names[first], data[:tensors_size], data[gap_end:])

    def _parse_record(self, shard: ShardInfo, member: str, tensors: memoryview, metadata: memoryview) -> Record:
        """A record from the bytes of its members; ValueError naming the member if it does not fit the manifest."""
        manifest = self.manifest
        try:
            record = from_members(member.removesuffix(f".{TENSORS_SUFFIX}"), tensors, metadata)
            shape = manifest.shard_spec(shard).first_frame_shape
            problems = schema_problems(record, shape, manifest.encoder.text_dim)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            problem = f"is not a record of this data set ({'; '.join(problems)})"
            raise ValueError(f"{self.storage.location}/{shard.name}: {member}: {problem}; run verify --repair")
        return record

    def record_index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order of `seed`."""
        epoch, index = divmod(position, self.num_records)
        return permute_index(index, count=self.num_records, seed=seed, epoch=epoch)

    def _read_offsets(self, shard_index: int) -> tuple[tuple[str, ...], numpy.ndarray]:
        """Names of a tar's members, and their (offset, size, crc32) as an array (N 3); record i has 2i and 2i + 1."""
        # The array takes a tenth of the memory of the `ShardIndex`.
        members = read_shard_index(self.storage, self.manifest.shards[shard_index]).members
        offsets = [(member.offset, member.size, member.crc32) for member in members]
        return tuple(member.name for member in members), numpy.array(offsets, numpy.int64)


def read_shard_index(storage: Storage, shard: ShardInfo) -> ShardIndex:
    """The content of a shard's sidecar; ValueError if it is not what the manifest says of it."""
    name = index_file_name(shard.name)
    index = parse_index(read_verified_file(storage, name, shard.index_sha256), f"{storage.location}/{name}")
    if replace(index.shard, name=shard.name) != shard:
        raise ValueError(f"{storage.location}/{name}: describes {index.shard}, the manifest {shard}")
    return index


def open_data_set(prefix: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> DataSet:
    """Open a data set in a folder, or at a prefix with `cache_bytes` of disk cache; ValueError if it is unfinished."""
    storage = open_storage(str(prefix), cache_bytes=cache_bytes)
    try:
        manifest = load_manifest(storage)
        return DataSet(storage, manifest, load_negative_embedding(storage, manifest))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={prefix}: does not exist or is unfinished; run encode again ({error})") from error
    except ConnectionError as error:
        raise ValueError(f"shards={error}") from error


def prefetch_ordered(load_item: Callable[[T], R], items: Iterable[T], *, depth: int, threads: int) -> Iterator[R]:
    """Yield `load_item(item)` in the order of `items`, up to `depth` ahead by threads; an error comes in its turn."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for item in items:
            pending.append(pool.submit(load_item, item))
            if len(pending) > depth:  # bounds the memory of finished items
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # also when the consumer stops early
