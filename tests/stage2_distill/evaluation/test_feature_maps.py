"""The maps of the distances and the energies: known shifts are found, in the right place."""

import pytest
import torch
from torch import Tensor

from stage2_distill.evaluation.feature_maps import latent_energies, latent_features, spectral_features, tanh_features
from stage2_distill.evaluation.latent_metrics import frechet_distance

MAPS = (latent_features, tanh_features, spectral_features)


def make_latents(seed: int, *, count: int = 1500) -> Tensor:
    """Latents (N 8 5 4 6): a still picture of low frequency, a change in every frame and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn((count, 8, 1, 2, 3), generator=generator).repeat_interleave(2, 3).repeat_interleave(2, 4)
    return (
        still
        + 0.5 * torch.randn((count, 8, 5, 1, 1), generator=generator)
        + 0.1 * torch.randn((count, 8, 5, 4, 6), generator=generator)
    )


def with_free_frames(latents: Tensor, changed: Tensor) -> Tensor:
    return torch.cat([latents[:, :, :1], changed], dim=2)


def test_every_map_finds_contrast_and_blur_above_its_floor() -> None:
    one, other = make_latents(0), make_latents(1)
    free = other[:, :, 1:]
    louder = with_free_frames(other, 1.2 * free)
    blurred = with_free_frames(other, free.mean(dim=(3, 4), keepdim=True).expand_as(free))
    still = with_free_frames(other, free.mean(dim=2, keepdim=True).expand_as(free))
    for feature_map in MAPS:
        floor = frechet_distance(feature_map(one), feature_map(other))
        for changed in (louder, blurred, still):
            assert frechet_distance(feature_map(changed), feature_map(one)) > 2 * floor


def test_spectra_have_the_power_of_their_bands() -> None:
    noise = torch.randn((200, 8, 5, 4, 6), generator=torch.Generator().manual_seed(0))
    white = spectral_features(noise)
    assert white.shape[0] == 200
    assert white.exp().mean() == pytest.approx(1, abs=0.05)  # equal in every band
    doubled = spectral_features(2 * noise)
    torch.testing.assert_close(doubled, white + 2 * torch.log(torch.tensor(2.0)), atol=1e-4, rtol=0)
    constant = spectral_features(torch.ones(1, 8, 5, 4, 6))[0]
    assert constant[0] == pytest.approx(torch.tensor(96.0).log().item())  # 4 x 4 x 6 positions, all in one band
    assert (constant[1:] < -10).all()


def test_energies_in_closed_form() -> None:
    latents = torch.zeros(2, 1, 3, 4, 6)
    latents[1, :, 1], latents[1, :, 2] = 3.0, -3.0
    sharp, change, contrast = latent_energies(latents)[1].tolist()
    assert sharp == 0, "even frames"
    assert change == pytest.approx(torch.tensor([3.0] * 24 + [-6.0] * 24).std().item())
    assert contrast == pytest.approx(torch.tensor([3.0] * 24 + [-3.0] * 24).std().item())
    assert latent_energies(2 * make_latents(0))[:, 0].mean() == pytest.approx(
        2 * float(latent_energies(make_latents(0))[:, 0].mean()), rel=1e-5
    )
