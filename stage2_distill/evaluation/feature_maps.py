"""What a distance looks at: three maps of different kinds, and the energies whose ratios to the teacher are reported.

One map is blind to what it averages away, so no student is judged by one alone. All maps need no download.
Shapes: N videos, C channels, T latent frames, H W latent size, D features.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

RANDOM_FEATURE_SEED, HIDDEN_WIDTH, FEATURE_WIDTH = 20261123, 128, 64  # changing one changes every distance
TANH_SEED, TANH_WIDTH = 20261130, 32
TIME_BANDS, SPACE_BANDS = 4, 4  # of the spectra, where the video has so many
SMALLEST_POWER = 1e-8  # whose logarithm is still finite


def random_weight(out_channels: int, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """A Gaussian convolution weight (out, *shape) that keeps the variance of unit inputs."""
    return torch.randn((out_channels, *shape), generator=generator) / math.sqrt(math.prod(shape))


def latent_features(latents: Tensor) -> Tensor:
    """Features (N 64) float32 of latents (N C T H W): two random convolutions of the free frames, averaged."""
    # Drawn on the CPU from a fixed seed, so that the map is the same on every machine.
    generator = torch.Generator().manual_seed(RANDOM_FEATURE_SEED)
    first = random_weight(HIDDEN_WIDTH, (latents.shape[1], 1, 2, 2), generator).to(latents.device)
    second = random_weight(FEATURE_WIDTH, (HIDDEN_WIDTH, 2, 1, 1), generator).to(latents.device)
    hidden = functional.relu(functional.conv3d(latents[:, :, 1:].float(), first))
    return functional.relu(functional.conv3d(hidden, second)).mean(dim=(2, 3, 4))


def tanh_features(latents: Tensor) -> Tensor:
    """Features (N 64) float32: mean and deviation over positions of tanh of a random convolution, with frame 0."""
    generator = torch.Generator().manual_seed(TANH_SEED)
    weight = random_weight(TANH_WIDTH, (latents.shape[1], 2, 2, 2), generator).to(latents.device)
    response = functional.conv3d(latents.float(), weight).tanh()
    positions = (2, 3, 4)
    return torch.cat([response.mean(dim=positions), response.std(dim=positions, correction=0)], dim=1)


def spectral_features(latents: Tensor) -> Tensor:
    """Features (N D <= 16) float32: logarithms of the mean power in bands of temporal and spatial frequency.

    Of the free frames, all channels together: blur, noise and flicker move power between the bands.
    """
    free = latents[:, :, 1:].float()
    power = torch.fft.fftn(free, dim=(2, 3, 4), norm="ortho").abs().square().mean(dim=1)  # (N T-1 H W)
    frames, height, width = (torch.fft.fftfreq(size, device=free.device).abs() for size in free.shape[2:])
    time = (frames * 2 * (TIME_BANDS - 1)).round().long()  # bands 0..3; frequencies of 0 to 1/2 per frame
    radius = (height[:, None].square() + width[None].square()).sqrt() * math.sqrt(2)  # 0..1
    space = (radius * (SPACE_BANDS - 1)).round().long()
    band = time[:, None, None] * SPACE_BANDS + space  # (T-1 H W)
    sums = torch.zeros(len(free), TIME_BANDS * SPACE_BANDS, device=free.device)
    sums.index_add_(1, band.flatten(), power.flatten(1))
    counts = torch.bincount(band.flatten(), minlength=sums.shape[1])
    return (sums[:, counts > 0] / counts[counts > 0] + SMALLEST_POWER).log()


def latent_energies(latents: Tensor) -> Tensor:
    """Deviations (N 3) of each video: of what a 3x3 spatial mean leaves, of frame differences, of the free frames.

    Their ratios to the teacher's are called sharpness, temporal variance and contrast.
    """
    values = latents.float()
    free = values[:, :, 1:]
    flat = free.transpose(1, 2).flatten(0, 1)  # (N (T-1) C H W), frame by frame
    # The mean at the border leaves the padding out, which would count as sharpness.
    blurred = functional.avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False)
    sharp = (flat - blurred).reshape(len(values), -1)
    return torch.stack([part.flatten(1).std(dim=1) for part in (sharp, values.diff(dim=2), free)], dim=1)
