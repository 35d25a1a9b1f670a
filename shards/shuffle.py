"""The shuffled order of an epoch, computed for one index at a time, so that no order is ever stored.

A Feistel network permutes all numbers of the smallest sufficient bit width. A result outside range(count) is permuted
again until it is inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from functools import lru_cache

from common.seed import derive_seed

FEISTEL_ROUNDS = 8
MASK_64_BITS = (1 << 64) - 1


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive_seed(seed, epoch, round_index, "order") for round_index in range(FEISTEL_ROUNDS))


def mix_bits(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64: Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64_BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64_BITS
    return value ^ (value >> 31)


def _permute_bits(value: int, bits: int, keys: tuple[int, ...]) -> int:
    """Permute the numbers of `bits` bits: each round scrambles one half by the other, which can be undone."""
    low_bits = bits // 2
    low, high = value & ((1 << low_bits) - 1), value >> low_bits
    for round_index, key in enumerate(keys):
        if round_index % 2:  # the halves differ by one bit if `bits` is odd
            high ^= mix_bits(low ^ key) >> (64 - (bits - low_bits))
        else:
            low ^= mix_bits(high ^ key) >> (64 - low_bits)
    return high << low_bits | low


def permute_index(index: int, *, count: int, seed: int, epoch: int) -> int:
    """Image of `index` under the permutation of range(count) that (seed, epoch) decides."""
    assert 0 <= index < count, (index, count)
    bits = max(2, (count - 1).bit_length())  # two halves of at least one bit
    keys = _round_keys(seed, epoch)
    value = _permute_bits(index, bits, keys)
    while value >= count:  # half of the numbers at most are outside, if count > 2
        value = _permute_bits(value, bits, keys)
    return value
