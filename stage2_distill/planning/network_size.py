"""The size of Wan's transformer from its config.json: parameters, and operations of one pass. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Self

from common.video import TEXT_LENGTH


@dataclass(frozen=True)
class PassFlops:
    """Floating-point operations of one forward pass of one video; a multiply-add counts as two."""

    products: float  # matrix products
    attention: float  # self-attention: scores and their sum over values

    @property
    def total(self) -> float:
        """All operations that are counted."""
        return self.products + self.attention


@dataclass(frozen=True)
class TransformerSize:
    """The fields of a transformer's config.json that decide its size; the defaults are Wan2.2-TI2V-5B."""

    num_layers: int = 30
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    ffn_dim: int = 14336
    text_dim: int = 4096
    freq_dim: int = 256
    in_channels: int = 48
    out_channels: int = 48
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The size that a transformer's configuration states."""
        return cls(**{item.name: settings[item.name] for item in fields(cls) if item.name in settings})

    @property
    def width(self) -> int:
        """Width D of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        d, ffn = self.width, self.ffn_dim
        attention = 4 * (d * d + d) + 2 * d  # query, key, value, output; norms of query and key
        # attention to video and text, norm before the latter, feed-forward, modulation
        return 2 * attention + 2 * d + 2 * d * ffn + ffn + d + 6 * d

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        d, patch = self.width, prod(self.patch_size)
        time = self.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d
        text = self.text_dim * d + d + d * d + d
        ends = self.in_channels * patch * d + d + d * self.out_channels * patch + self.out_channels * patch + 2 * d
        return self.num_layers * self.block_parameters + time + text + ends

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of one adapter on every matrix of the blocks."""
        return self.num_layers * rank * (8 * 2 * self.width + 2 * (self.width + self.ffn_dim))

    def pass_flops(self, tokens: int, text_tokens: int = TEXT_LENGTH) -> PassFlops:
        """Operations of one forward pass over `tokens` tokens of video; those on one row per time are left out."""
        d, ends = self.width, (self.in_channels + self.out_channels) * prod(self.patch_size)
        per_token = 4 * d * d + 2 * d * d + 2 * d * self.ffn_dim  # self-attention, query and output to text, MLP
        text = 2 * d * d * text_tokens + 2 * tokens * text_tokens * d  # keys and values, attention to text
        block = 2 * (per_token * tokens + text)
        embedding = 2 * (ends * d * tokens + (self.text_dim + d) * d * text_tokens)
        return PassFlops(self.num_layers * block + embedding, self.num_layers * 4 * tokens**2 * d)
