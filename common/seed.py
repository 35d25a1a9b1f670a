"""Randomness as a pure function of (seed, iteration, sample, purpose), never of the rank or of what ran before."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, iteration: int, sample: int, purpose: str) -> int:
    """A 63-bit integer that depends on all four."""
    text = f"{seed}/{iteration}/{sample}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def make_generator(
    seed: int, iteration: int, sample: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on `device` for one sample's draws for one purpose in one iteration."""
    return torch.Generator(device).manual_seed(derive_seed(seed, iteration, sample, purpose))


def draw_normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal float32 draws (B *shape), sample b from generators[b]."""
    draws = torch.empty(len(generators), *shape, device=generators[0].device)
    for row, row_generator in zip(draws, generators, strict=True):
        row.normal_(generator=row_generator)
    return draws


def draw_uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform draws (B) in [0, 1), sample b from generators[b]."""
    return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators])
