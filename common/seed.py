"""Randomness as a pure function of (seed, iteration, sample, purpose), never of the rank or of earlier draws."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, iteration: int, sample: int, purpose: str) -> int:
    """A 63-bit integer that depends on all four arguments."""
    text = f"{seed}/{iteration}/{sample}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # manual_seed is signed


def make_generator(
    seed: int, iteration: int, sample: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator on `device` for the draws of one sample for one purpose in one iteration."""
    return torch.Generator(device).manual_seed(derive_seed(seed, iteration, sample, purpose))


def draw_normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal float32 draws (B *shape), sample b from generators[b]."""
    # One generator per sample, so that a sample's noise does not depend on the batch that it is in.
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])


def draw_uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform draws (B) in [0, 1), sample b from generators[b]."""
    return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generators])
