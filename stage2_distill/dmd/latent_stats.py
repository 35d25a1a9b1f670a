"""Statistics of the student's latents.

Shapes: B batch, C channels, T latent frames, H W latent size.
"""

import torch
from torch import Tensor

from common.condition import Condition, free_mean

LATENT_STATS = ("saturation", "temporal_variance", "first_frame_distance")


@torch.no_grad()
def latent_stats(x0: Tensor, condition: Condition) -> Tensor:
    """The LATENT_STATS (3) of videos x0 (B C T H W), as means over the samples.

    saturation: root mean square of the free frames, 1 for videos of usual contrast, because latents are normalised.
    temporal_variance: variance over time, mean over positions; 0 for a still video.
    first_frame_distance: mean |frame 1 - frame 0|; 1.13 for unrelated frames of usual contrast.
    """
    saturation = free_mean(x0**2, condition).sqrt().mean()
    variance = x0.var(dim=2, correction=0).mean()
    distance = (x0[:, :, 1] - x0[:, :, 0]).abs().mean()
    return torch.stack([saturation, variance, distance])
