"""First-frame conditioning. Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.

A given first frame is never noised: frame 0 of every video that a network sees or returns is the clean latent,
its tokens carry time 0, and only the frames after it are free (Wan2.2 TI2V, `expand_timesteps` in diffusers).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from common.video import tokens_per_frame


@dataclass(frozen=True)
class Condition:
    """What a video is made from."""

    first_frame: Tensor | None  # (B C 1 H W); None = text only
    text: Tensor  # (B L D), zero rows after each prompt's end


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t (B C T H W), sigma (B), condition) -> x0 (B C T H W)


def pin(x: Tensor, condition: Condition) -> Tensor:
    """Replace frame 0 of x (B C T H W) by the given first frame; x itself stays as it is."""
    if condition.first_frame is None:
        return x
    return torch.cat([condition.first_frame.to(x.dtype), x[:, :, 1:]], dim=2)


def free(x: Tensor, condition: Condition) -> Tensor:
    """The frames of x (B C T H W) that are not given: all of them, or all but frame 0."""
    return x if condition.first_frame is None else x[:, :, 1:]


def token_sigma(sigma: Tensor, shape: torch.Size, condition: Condition) -> Tensor:
    """Sigma of every token (B tokens), frame-major, of a video of `shape` (B C T H W): 0 where the frame is given."""
    frames = repeat(sigma, "b -> b t", t=shape[2])
    if condition.first_frame is not None:
        frames = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, 1:]], dim=1)
    return repeat(frames, "b t -> b (t n)", n=tokens_per_frame(shape[3], shape[4]))
