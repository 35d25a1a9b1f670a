"""Both models of stage one as `encode` and `sample` use them, so that they compute the same numbers.

Shapes: B batch, C channels, H W latent size, L text rows, D text width, X Y pixel height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_encode.models import text_encoder, vae


@dataclass(frozen=True)
class RowEncoder:
    """The VAE's encoder for first frames, and the text encoder."""

    vae: vae.FrameEncoder
    text: text_encoder.TextEncoder
    dtype: torch.dtype = torch.bfloat16  # of the results; a data set always stores bf16

    def tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """The cleaned prompts, and their token ids."""
        clean = [text_encoder.clean_prompt(prompt) for prompt in prompts]
        return clean, text_encoder.tokenize_prompts(self.text, clean)

    def embed_tokens(self, tokens: Sequence[Sequence[int]], *, max_tokens: int) -> list[Tensor]:
        """Embeddings (L D) on the CPU, perhaps still in transfer, with `max_tokens` per batch."""
        return text_encoder.embed_prompts(self.text, tokens, max_tokens=max_tokens, dtype=self.dtype)

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """First-frame latents (B C 1 H W), on the VAE's device, of pictures (B X Y 3) uint8."""
        return vae.encode_frames(self.vae, pixels).to(self.dtype)
