"""The two-sample test on decoded pixels: cuts a window of every set and has it told from the teacher's of another seed.

The test itself is stage two's, as that of latents: it is given as a function. Shapes: N videos of a set, B of a batch,
F frames, X Y pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from shards.comparison import Comparison, latent_set_name

MAX_WINDOW = (17, 64, 96)  # F X Y of a video that the test sees, so that time and memory do not depend on the size
Accuracy = tuple[float, float, float]  # mean, and the bounds of its 95 % interval
TellApart = Callable[[Tensor, Tensor, int], Accuracy]  # two sets (N 3 F X Y) uint8, seed


@dataclass(frozen=True)
class PixelTest:
    """Windows of the sets that are still to be compared, and the answers so far, by the name of the set."""

    tell_apart: TellApart
    pairs: dict[str, tuple[str, int]]  # set -> the teacher's set of another seed, and the seed of the test
    windows: dict[str, Tensor] = field(default_factory=dict)  # (N 3 F X Y) uint8
    answers: dict[str, Accuracy] = field(default_factory=dict)

    def add(self, name: str, parts: list[Tensor]) -> None:
        """Add a complete set of windows, and test every pair that it completes; what no pair needs is let go."""
        self.windows[name] = torch.cat(parts)
        for own, (other, seed) in self.pairs.items():
            if own not in self.answers and {own, other} <= self.windows.keys():
                self.answers[own] = self.tell_apart(self.windows[own], self.windows[other], seed)
        waiting = [(own, other) for own, (other, _) in self.pairs.items() if own not in self.answers]
        needed = {one for pair in waiting for one in pair}
        for done in self.windows.keys() - needed:
            del self.windows[done]


def open_pixel_test(comparison: Comparison, tell_apart: TellApart) -> PixelTest:
    """The test of every set of a comparison."""
    pairs = {
        latent_set_name(candidate, seed): (latent_set_name(comparison.teacher, reference), seed)
        for candidate in comparison.contestants
        for seed, reference in zip(comparison.seeds, comparison.references, strict=True)
    }
    return PixelTest(tell_apart, pairs)


def cut_window(videos: Tensor) -> Tensor:
    """The first frames and the centre (B 3 F X Y) on the CPU of videos (B F X Y 3), as much as the test sees."""
    frames, height, width = (min(size, limit) for size, limit in zip(videos.shape[1:4], MAX_WINDOW, strict=True))
    top, left = (videos.shape[2] - height) // 2, (videos.shape[3] - width) // 2
    window = videos[:, :frames, top : top + height, left : left + width]
    return rearrange(window, "b f x y c -> b c f x y").cpu().contiguous()
