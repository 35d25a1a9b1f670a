"""Several data sets read as one: `A`, `B:0.3` draws three records of B for every ten of A.

Positions come in cycles (of 13 in this example) in which each data set has its exact share, at shuffled positions.
Each data set keeps its own endless order, so all of its records are read once before any is read again.
"""

import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from common.condition import Condition
from common.seed import derive_seed
from common.video import TEXT_LENGTH, VideoSpec
from shards.dataset import DataSet, SizeGroup, open_data_set
from shards.manifest import Manifest, list_differences
from shards.record import Record, collate_records
from shards.shuffle import permute_index

WEIGHT_RESOLUTION = 1000  # weights are rounded to a thousandth
WEIGHT_PATTERN = re.compile(r"[-+]?([0-9.]+(e[-+]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE)  # valid or not


def parse_weight(text: str) -> tuple[str, float]:
    """Split `PREFIX` or `PREFIX:WEIGHT` into its prefix and its weight (default 1); ValueError for a bad weight."""
    prefix, _, tail = text.rpartition(":")
    is_port = re.fullmatch(r"[a-z0-9]+://[^/]*", prefix, re.IGNORECASE)  # of https://host:8000
    is_name = Path(text).is_dir() and not Path(prefix).is_dir()  # a folder named out-12:30
    if not prefix or is_port or is_name or not WEIGHT_PATTERN.fullmatch(tail):
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError as error:
        raise ValueError(f"shards={text}: the weight {tail} is not a number; give FOLDER:WEIGHT") from error
    if not math.isfinite(weight):
        raise ValueError(f"shards={text}: the weight is {weight}; give a finite number")
    if not 1 / WEIGHT_RESOLUTION <= weight <= WEIGHT_RESOLUTION:
        raise ValueError(f"shards={text}: the weight must be between 1/{WEIGHT_RESOLUTION} and {WEIGHT_RESOLUTION}")
    return prefix, weight


def draw_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Draws of each data set per cycle: 10 and 3 for weights of 1 and 0.3."""
    rounded = [round(weight * WEIGHT_RESOLUTION) for weight in weights]
    return tuple(share // math.gcd(*rounded) for share in rounded)


@lru_cache(maxsize=64)
def cycle_draws(shares: tuple[int, ...], seed: int, cycle: int) -> tuple[tuple[int, int], ...]:
    """For each position of a cycle: the index of its data set, and how many draws of it in this cycle precede."""
    size, bounds = sum(shares), list(accumulate(shares))
    key = derive_seed(seed, 0, 0, "mixture")
    draw_counts, draws = [0] * len(shares), []
    for position in range(size):
        owner = bisect_right(bounds, permute_index(position, count=size, seed=key, epoch=cycle))
        draws.append((owner, draw_counts[owner]))
        draw_counts[owner] += 1
    return tuple(draws)


def list_mixture_differences(first: Manifest, other: Manifest, *, many_sizes: bool) -> list[str]:
    """Why two data sets cannot be mixed, a line each; with `many_sizes` their heights and widths may differ."""
    differences = list_differences(first.encoding, other.encoding)
    if many_sizes:
        return [line for line in differences if line.partition(":")[0] not in ("height", "width")]
    if first.sizes != other.sizes and not differences:
        return ["one of them holds several sizes"]
    return differences


class DataSetMixture:
    """Data sets read as one. Records are numbered through all of them, in the order of `data_sets`.

    Raises ValueError if their encoders differ, or their sizes where the caller reads no `many_sizes`.
    """

    def __init__(self, data_sets: Sequence[DataSet], weights: Sequence[float], *, many_sizes: bool = False) -> None:
        first = data_sets[0]
        for other in data_sets[1:]:
            differences = "; ".join(list_mixture_differences(first.manifest, other.manifest, many_sizes=many_sizes))
            if differences:
                location = first.storage.location
                raise ValueError(f"shards={other.storage.location}: cannot be mixed with {location}: {differences}")
        self.data_sets, self.negative = tuple(data_sets), first.negative
        self.manifest = first.manifest  # only its encoder is that of all, and its spec if there is one size
        self.draws_per_cycle = draw_shares(weights)
        self.digests = tuple(digest for data in data_sets for digest in data.digests)
        self._first_records = array("q", accumulate((data.num_records for data in data_sets), initial=0))
        self.num_records = self._first_records[-1]

    @property
    def size_groups(self) -> tuple[SizeGroup, ...]:
        """The records of all data sets by size, by height and then by width."""
        ranges: dict[VideoSpec, list[range]] = {}
        for first, data in zip(self._first_records, self.data_sets, strict=False):
            for group in data.size_groups:
                shifted = [range(first + own.start, first + own.stop) for own in group.ranges]
                ranges.setdefault(group.spec, []).extend(shifted)
        by_size = sorted(ranges.items(), key=lambda item: (item[0].height, item[0].width))
        return tuple(SizeGroup(spec, tuple(own)) for spec, own in by_size)

    @property
    def size_shares(self) -> dict[VideoSpec, float]:
        """The share of each size in the records that are read, which follows the weights of the data sets."""
        shares = dict.fromkeys((group.spec for group in self.size_groups), 0.0)
        for draws, data in zip(self.draws_per_cycle, self.data_sets, strict=True):
            for spec, share in data.size_shares.items():
                shares[spec] += share * draws / sum(self.draws_per_cycle)
        return shares

    def record_spec(self, index: int) -> VideoSpec:
        """Size and frame rate of record `index` of 0..num_records-1, without reading it."""
        data_set_index = bisect_right(self._first_records, index) - 1
        return self.data_sets[data_set_index].record_spec(index - self._first_records[data_set_index])

    def read_record(self, index: int) -> Record:
        """Record `index` of 0..num_records-1; IndexError for another index."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records}")
        data_set_index = bisect_right(self._first_records, index) - 1
        return self.data_sets[data_set_index].read_record(index - self._first_records[data_set_index])

    def record_index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order of `seed`."""
        cycle, position_in_cycle = divmod(position, sum(self.draws_per_cycle))
        data_set_index, draw_index = cycle_draws(self.draws_per_cycle, seed, cycle)[position_in_cycle]
        own_position = cycle * self.draws_per_cycle[data_set_index] + draw_index
        own_seed = derive_seed(seed, 0, data_set_index, "data set")  # else equal sizes would share one order
        own_index = self.data_sets[data_set_index].record_index(own_position, seed=own_seed)
        return self._first_records[data_set_index] + own_index


class RecordStream:
    """The endless order of records that a seed decides, read in batches."""

    def __init__(self, data: DataSet | DataSetMixture, *, seed: int, max_text_tokens: int = TEXT_LENGTH) -> None:
        self.data, self.seed, self.max_text_tokens = data, seed, max_text_tokens

    def record_index(self, position: int) -> int:
        """Number of the record at a position."""
        return self.data.record_index(position, seed=self.seed)

    def record_spec(self, position: int) -> VideoSpec:
        """Size and frame rate of the record at a position."""
        return self.data.record_spec(self.record_index(position))

    def read_batch(self, positions: Sequence[int]) -> Condition:
        """The records at these positions, all of one size, collated."""
        records = [self.data.read_record(self.record_index(position)) for position in positions]
        return collate_records(records, max_text_tokens=self.max_text_tokens)


def open_data_sets(shards: Sequence[str], *, many_sizes: bool = False) -> DataSet | DataSetMixture:
    """Open one data set, or several `PREFIX` or `PREFIX:WEIGHT` as one; ValueError if they cannot be mixed.

    many_sizes: the caller reads records of several sizes.
    """
    parts = [parse_weight(text) for text in shards]
    data_sets = [open_data_set(prefix) for prefix, _ in parts]
    if len(parts) == 1:
        return data_sets[0]
    return DataSetMixture(data_sets, [weight for _, weight in parts], many_sizes=many_sizes)
