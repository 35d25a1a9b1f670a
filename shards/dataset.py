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
from shards.manifest import MANIFEST, NEGATIVE, Manifest, intact, parse_manifest, parse_negative
from shards.record import TENSORS, Batch, Record, collate, from_members
from shards.shuffle import shuffled
from shards.storage.open import Place, open_place, read_checked, read_whole
from shards.writer import Index, index_name, parse_index

T = TypeVar("T")
R = TypeVar("R")
KEPT = 200_000  # records whose offsets are held at once, about 0.2 kB each
CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class Offsets:
    """Where the members of one shard lie, in little memory; member 2i and 2i+1 belong to record i."""

    names: tuple[str, ...]
    offsets: "array[int]"
    sizes: "array[int]"
    sums: "array[int]"  # crc32

    @staticmethod
    def of(index: Index) -> "Offsets":
        """The sidecar's facts without the rest."""
        members = index.members
        return Offsets(
            tuple(member.name for member in members),
            array("q", (member.offset for member in members)),
            array("q", (member.size for member in members)),
            array("I", (member.crc32 for member in members)),
        )


class DataSet:
    """A finished data set, read by record number."""

    def __init__(self, place: Place, manifest: Manifest, negative: Tensor) -> None:
        self.place, self.manifest, self.negative = place, manifest, negative  # negative (L D)
        self.starts = array("q", chain([0], accumulate(shard.records for shard in manifest.shards)))
        self._touched: OrderedDict[int, Offsets] = OrderedDict()
        self._most = max(1, KEPT * len(manifest.shards) // self.records)  # shards whose offsets are held
        self._lock = threading.Lock()

    @property
    def records(self) -> int:
        """Number of records."""
        return self.starts[-1]

    def record(self, index: int) -> Record:
        """Record `index` of 0..records-1; its hash is verified. Safe to call from several threads."""
        if not 0 <= index < self.records:
            raise IndexError(f"record {index} of {self.records}")
        number = bisect_right(self.starts, index) - 1
        first = 2 * (index - self.starts[number])
        known = self._offsets(number)
        start = known.offsets[first]
        stops = [known.offsets[i] + known.sizes[i] - start for i in (first, first + 1)]
        parts = (slice(0, stops[0]), slice(stops[1] - known.sizes[first + 1], stops[1]))
        name = self.manifest.shards[number].name

        def read(fresh: bool) -> memoryview:
            buffer = numpy.empty(stops[1], numpy.uint8).data  # its memory becomes the record's tensors
            self.place.fill(name, start, buffer, fresh=fresh)
            return buffer

        def damaged(data: memoryview) -> list[str]:
            sums = [zlib.crc32(data[part]) for part in parts]
            return [known.names[first + i] for i in (0, 1) if sums[i] != known.sums[first + i]]

        data = read_checked(self.place, name, read, damaged)
        return from_members(known.names[first].removesuffix(f".{TENSORS}"), data[parts[0]], data[parts[1]])

    def index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order that `seed` decides."""
        return shuffled(position, count=self.records, seed=seed)

    def _offsets(self, number: int) -> Offsets:
        """Member offsets of a shard: read when it is first touched, forgotten when many others were since."""
        with self._lock:
            if number in self._touched:
                self._touched.move_to_end(number)
                return self._touched[number]
        shard = self.manifest.shards[number]
        loaded = Offsets.of(parse_index(read_whole(self.place, index_name(shard.name), shard.index_sha256)))
        with self._lock:
            self._touched[number] = loaded
            while len(self._touched) > self._most:
                self._touched.popitem(last=False)
        return loaded


def open_data_set(prefix: str | Path, *, cache_bytes: int = CACHE_BYTES) -> DataSet:
    """Open the finished data set in a folder or at an object-store prefix; ValueError where there is none.

    Of an object store, up to `cache_bytes` are kept on the local disk.
    """
    place = open_place(str(prefix), cache_bytes=cache_bytes)
    try:
        data = place.read(MANIFEST, fresh=True)
        if not intact(data):
            data = place.read(MANIFEST, fresh=True)
        manifest = parse_manifest(data, place.where)
        negative = parse_negative(read_whole(place, NEGATIVE, manifest.negative_sha256), place.where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"shards={prefix}: does not exist or is unfinished, run encode again ({error})") from error
    except ConnectionError as error:
        raise ValueError(f"shards={error}") from error
    return DataSet(place, manifest, negative)


class Records(Protocol):
    """A data set, or several as one."""

    @property
    def records(self) -> int:
        """Number of records."""
        ...

    def record(self, index: int) -> Record:
        """Record `index` of 0..records-1."""
        ...

    def index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order that `seed` decides."""
        ...


class Stream:
    """The endless order of records; `seed` decides it."""

    def __init__(self, data: Records, *, seed: int, text_rows: int = TEXT_LENGTH) -> None:
        self.data, self.seed, self.text_rows = data, seed, text_rows

    def index(self, position: int) -> int:
        """Number of the record at a position."""
        return self.data.index(position, seed=self.seed)

    def batch(self, positions: Sequence[int]) -> Batch:
        """The records at these positions, collated."""
        return collate([self.data.record(self.index(position)) for position in positions], text_rows=self.text_rows)


def prefetch(load: Callable[[T], R], items: Iterable[T], *, depth: int, threads: int) -> Iterator[R]:
    """`load` of each item, in order, up to `depth` of them ahead of the consumer; errors surface in their place."""
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
