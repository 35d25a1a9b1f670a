"""First-frame conditioning. Shapes: B batch, C channels, T latent frames, H W latent size, L text rows, D text width.

A given first frame is never noised: frame 0 of every video that a network sees or returns is the clean latent,
its tokens carry time 0, and only the frames after it are free (Wan2.2 TI2V, `expand_timesteps` in diffusers).
A batch may hold both kinds: each sample is pinned, timed and averaged by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device import copy_async
from common.flow import per_sample


@dataclass(frozen=True)
class Condition:
    """What a video is made from."""

    first_frame: Tensor | None  # (B C 1 H W); None = text only
    text: Tensor  # (B L D), zero rows after each prompt's end; of L < 512 the last one stands for all up to 512
    given: Tensor | None = None  # (B) bool: which samples have their first frame; None = all
    frame_time: Tensor | None = None  # (B): time of a given frame's tokens, as a share of the video's; None = 0

    def to(self, device: torch.device) -> "Condition":
        """The same on a device, perhaps not there yet: what is begun on a GPU waits for it, the host does not."""
        tensors = (self.first_frame, self.text, self.given, self.frame_time)
        frame, text, given, time = (None if part is None else copy_async(part, device) for part in tensors)
        assert text is not None
        return Condition(frame, text, given, time)


Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t (B C T H W), sigma (B), condition) -> x0 (B C T H W)


def concat_conditions(conditions: Sequence[Condition]) -> Condition:
    """One batch of several with the same fields."""

    def concat_present(parts: list[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return Condition(
        concat_present([c.first_frame for c in conditions]),
        torch.cat([c.text for c in conditions]),
        concat_present([c.given for c in conditions]),
        concat_present([c.frame_time for c in conditions]),
    )


def pin(x: Tensor, condition: Condition) -> Tensor:
    """Replace frame 0 of x (B C T H W) by the given first frame; x itself stays as it is."""
    if condition.first_frame is None:
        return x
    frame = condition.first_frame.to(x.dtype)
    if condition.given is not None:
        frame = torch.where(per_sample(condition.given), frame, x[:, :, :1])
    return torch.cat([frame, x[:, :, 1:]], dim=2)


def free_frames(x: Tensor, condition: Condition) -> Tensor:
    """Which frames (B T) of x (B C T H W) are not given."""
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    if condition.first_frame is not None:
        mask[:, 0] = False if condition.given is None else ~condition.given
    return mask


def free_mean(x: Tensor, condition: Condition) -> Tensor:
    """Mean (B) over the free frames of each sample of x (B C T H W)."""
    mask = free_frames(x, condition)
    return torch.where(mask, x.mean(dim=(1, 3, 4)), 0).sum(dim=1) / mask.sum(dim=1)


def frame_sigma(sigma: Tensor, condition: Condition) -> Tensor:
    """Sigmas (B K) of a video at sigma (B): that of a given frame 0, then that of all free frames."""
    if condition.first_frame is None:
        return sigma[:, None]
    first = torch.zeros_like(sigma) if condition.frame_time is None else condition.frame_time.to(sigma) * sigma
    if condition.given is not None:
        first = torch.where(condition.given, first, sigma)
    return torch.stack([first, sigma], dim=1)
