"""The picture of the signature: ratios of known variances, and what is taken out of a clip."""

import pytest
import torch
from torch import Tensor

from examples.nano.signature import draw_curves, principal_directions, tokens, variance_ratios, without_smallest


@pytest.fixture
def clips() -> Tensor:
    """Latents (64 6 3 4 4) whose channels differ in variance."""
    scale = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.1])[:, None, None, None]
    return scale * torch.randn(64, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_ratios_are_those_of_the_variances(clips: Tensor) -> None:
    mean, directions = principal_directions(clips)
    variances = ((tokens(clips) - mean) @ directions).var(dim=0)
    assert bool((variances.diff() <= 1e-9).all()), "the largest first"
    torch.testing.assert_close(variance_ratios(clips, clips, directions), torch.ones(3, dtype=torch.float64))
    noisy = clips.clone()
    noisy[:, 5, 1:] *= 2  # the channel with the least: the last 4 of 24 directions, half of the last band
    ratios = variance_ratios(noisy, clips, directions)
    assert ratios[:2].tolist() == pytest.approx([1, 1], abs=0.01) and ratios[2].item() == pytest.approx(2, rel=0.05)


def test_only_the_smallest_directions_are_taken_out(clips: Tensor) -> None:
    mean, directions = principal_directions(clips)
    rest = without_smallest(clips, mean, directions)
    assert torch.equal(rest[:, :, 0], clips[:, :, 0]), "the first frame is given"
    coordinates = (tokens(rest) - mean) @ directions
    expected = (tokens(clips) - mean) @ directions
    torch.testing.assert_close(coordinates[:, :18], expected[:, :18], atol=1e-4, rtol=0)
    assert coordinates[:, 18:].abs().max() < 1e-4


def test_curves_are_drawn_in_their_colours() -> None:
    picture = draw_curves({"teacher, other seeds": torch.ones(24), "student": torch.linspace(1, 8, 24)})
    assert {(0x88, 0x88, 0x88), (0xC0, 0x39, 0x2B)} <= {colour for _, colour in picture.getcolors(1 << 20)}
