"""Several data sets as one: `A`, `B:0.3` draws three records of B for every ten of A.

Positions go in cycles (of 13 here) in which each data set has its exact share, at shuffled places. Within its share a
data set keeps its own endless order, so each of its records is read once before any is read again.
"""

import math
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

from common.seed import derive_seed
from shards.dataset import DEFAULT_CACHE_BYTES, DataSet, open_data_set
from shards.manifest import Manifest, encoding_differences
from shards.record import Record
from shards.shuffle import permute_index

WEIGHT_RESOLUTION = 1000  # weights are rounded to a thousandth


def parse_weight(text: str) -> tuple[str, float]:
    """`PREFIX` or `PREFIX:WEIGHT` as its two parts; the colon of `https://host:8000` is a port's."""
    prefix, colon, tail = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", tail) or re.fullmatch(r"[a-z0-9]+://[^/]*", prefix):
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError as error:
        raise ValueError(f"shards={text}: {tail} is no weight") from error
    if not 1 / WEIGHT_RESOLUTION <= weight <= WEIGHT_RESOLUTION:
        raise ValueError(f"shards={text}: the weight must be between 1/{WEIGHT_RESOLUTION} and {WEIGHT_RESOLUTION}")
    return prefix, weight


@lru_cache(maxsize=64)
def cycle_draws(shares: tuple[int, ...], seed: int, cycle: int) -> tuple[tuple[int, int], ...]:
    """For each place of a cycle: the data set that is drawn from, and how often it was in this cycle before."""
    size, bounds = sum(shares), list(accumulate(shares))
    key = derive_seed(seed, 0, 0, "mixture")
    owners = [
        bisect_right(bounds, permute_index(position, count=size, seed=key, epoch=cycle)) for position in range(size)
    ]
    drawn, draws = [0] * len(shares), []
    for owner in owners:
        draws.append((owner, drawn[owner]))
        drawn[owner] += 1
    return tuple(draws)


class DataSetMixture:
    """Data sets read as one; records are numbered through all of them, in the order given."""

    def __init__(self, data_sets: Sequence[DataSet], weights: Sequence[float]) -> None:
        first = data_sets[0]
        for other in data_sets[1:]:
            differences = encoding_differences(first.manifest, other.manifest)
            if differences:
                raise ValueError(
                    f"shards={other.storage.location} cannot mix with {first.storage.location}: {'; '.join(differences)}"
                )
        self.data_sets, self.negative = tuple(data_sets), first.negative
        self.manifest: Manifest = first.manifest  # its spec and encoder are those of all
        rounded = [round(weight * WEIGHT_RESOLUTION) for weight in weights]
        self.draws_per_cycle = tuple(share // math.gcd(*rounded) for share in rounded)  # draws a cycle
        self._starts = array("q", chain([0], accumulate(data.num_records for data in data_sets)))

    @property
    def num_records(self) -> int:
        """Number of records of all data sets."""
        return self._starts[-1]

    def read_record(self, index: int) -> Record:
        """Record `index` of 0..records-1."""
        if not 0 <= index < self.num_records:
            raise IndexError(f"record {index} of {self.num_records}")
        data_set_index = bisect_right(self._starts, index) - 1
        return self.data_sets[data_set_index].read_record(index - self._starts[data_set_index])

    def record_index(self, position: int, *, seed: int) -> int:
        """Number of the record at a position of the endless order that `seed` decides."""
        cycle, position_in_cycle = divmod(position, sum(self.draws_per_cycle))
        data_set_index, draw_index = cycle_draws(self.draws_per_cycle, seed, cycle)[position_in_cycle]
        data_set_position = cycle * self.draws_per_cycle[data_set_index] + draw_index
        return self._starts[data_set_index] + self.data_sets[data_set_index].record_index(
            data_set_position, seed=derive_seed(seed, 0, data_set_index, "data set")
        )


def open_data_sets(shards: Sequence[str], *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> DataSet | DataSetMixture:
    """Open one data set, or several `PREFIX` or `PREFIX:WEIGHT` as one; ValueError where they do not fit together."""
    parts = [parse_weight(text) for text in shards]
    data_sets = [open_data_set(prefix, cache_bytes=cache_bytes) for prefix, _ in parts]
    return data_sets[0] if len(parts) == 1 else DataSetMixture(data_sets, [weight for _, weight in parts])
