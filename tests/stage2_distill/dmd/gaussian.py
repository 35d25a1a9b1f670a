"""Laws whose best denoisers are known: every x0 is Gaussian. Videos are (B 2 1 1 1): points of the plane."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from common.condition import Condition

TEXT_ONLY = Condition(first_frame=None, text=torch.zeros(1, 1, 1))


def points(x: Tensor) -> Tensor:
    return rearrange(x, "b c 1 1 1 -> b c")


def videos(x: Tensor) -> Tensor:
    return rearrange(x, "b c -> b c 1 1 1")


@dataclass
class Gaussian:
    """The law N(mean, factor factor^T)."""

    mean: Tensor  # (2)
    factor: Tensor  # (2 2)

    @property
    def covariance(self) -> Tensor:
        return self.factor @ self.factor.T

    def noisy(self, sigma: Tensor) -> torch.distributions.MultivariateNormal:
        """Law of x_t at sigma (B)."""
        s = sigma[:, None]
        covariance = (1 - s[:, None]) ** 2 * self.covariance + s[:, None] ** 2 * torch.eye(2)
        return torch.distributions.MultivariateNormal((1 - s) * self.mean, covariance)

    def denoise(self, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """E[x0 | x_t], in closed form."""
        s = sigma[:, None]
        covariance = (1 - s[:, None]) ** 2 * self.covariance + s[:, None] ** 2 * torch.eye(2)
        centred = points(x_t) - (1 - s) * self.mean
        solved = torch.linalg.solve(covariance, centred[:, :, None])
        return videos(self.mean + (1 - s) * (self.covariance @ solved)[:, :, 0])

    def sample(self, count: int, draws: torch.Generator) -> Tensor:
        return videos(self.mean + torch.randn(count, 2, generator=draws) @ self.factor.T)
