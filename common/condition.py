"""First-frame conditioning. Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.

A given first frame is never noised: frame 0 of every video that a network sees or returns is the clean latent, its
tokens have time 0, and only the frames after it are free (Wan2.2 TI2V, `expand_timesteps` in diffusers). A batch may
mix samples with and without a given first frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.device import copy_async
from common.flow import per_sample


@dataclass(frozen=True)
class Condition:
    """What a video is made from."""

    first_frame: Tensor | None  # (B C 1 H W); None = text only
    text: Tensor  # (B L D), zero rows after each prompt's end; if L < 512, the last row represents all up to 512
    given: Tensor | None = None  # (B) bool: which samples have their first frame; None = all
    frame_time: Tensor | None = None  # (B): time of a given frame's tokens, as a fraction of the video's; None = 0

    def to(self, device: torch.device) -> "Condition":
        """The same on a device. A copy to a GPU is asynchronous: work on the GPU waits for it, the CPU does not."""
        return replace(
            self, **{name: copy_async(part, device) for name, part in vars(self).items() if part is not None}
        )


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t (B C T H W), sigma (B), condition) -> x0 (B C T H W)


def concat_conditions(conditions: Sequence[Condition]) -> Condition:
    """One batch of several conditions, which must have the same fields."""
    present = [name for name, part in vars(conditions[0]).items() if part is not None]
    return replace(conditions[0], **{name: torch.cat([vars(c)[name] for c in conditions]) for name in present})


def take_first_frame(latents: Tensor) -> Tensor:
    """The first latent frame (C 1 H W) of a clip's latents (C T H W).

    It is what the VAE makes of the first picture alone: its convolutions are causal, and frame 0 is a chunk of its own.
    """
    return latents[:, :1]


def pin(x: Tensor, condition: Condition) -> Tensor:
    """A copy of x (B C T H W) with frame 0 replaced by the given first frame; x itself if none is given."""
    if condition.first_frame is None:
        return x
    frame = condition.first_frame.to(x.dtype)
    if condition.given is not None:
        frame = torch.where(per_sample(condition.given), frame, x[:, :, :1])
    return torch.cat([frame, x[:, :, 1:]], dim=2)


def free_frames(x: Tensor, condition: Condition) -> Tensor:
    """Mask (B T) of the frames of x (B C T H W) that are not given."""
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    if condition.first_frame is not None:
        mask[:, 0] = False if condition.given is None else ~condition.given
    return mask


def free_mean(x: Tensor, condition: Condition) -> Tensor:
    """Mean (B) of x (B C T H W) over the free frames of each sample."""
    mask = free_frames(x, condition)
    # All frames have the same size, so the mean of the frames' means is the mean of their elements.
    return torch.where(mask, x.mean(dim=(1, 3, 4)), 0).sum(dim=1) / mask.sum(dim=1)


def frame_sigma(sigma: Tensor, condition: Condition) -> Tensor:
    """Sigmas (B 2) of a video at sigma (B): of frame 0, then of all other frames; (B 1) without a first frame."""
    if condition.first_frame is None:
        return sigma[:, None]
    first = torch.zeros_like(sigma) if condition.frame_time is None else condition.frame_time.to(sigma) * sigma
    if condition.given is not None:
        first = torch.where(condition.given, first, sigma)
    return torch.stack([first, sigma], dim=1)
