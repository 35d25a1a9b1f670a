"""Draws depend on their generator alone, not on who is drawn beside them."""

import torch

from common.seed import draw_normal, make_generator


def test_a_samples_noise_is_that_of_its_own_generator() -> None:
    draws = draw_normal((3, 5), [make_generator(1, 2, sample, "x") for sample in range(4)])
    alone = [torch.randn(3, 5, generator=make_generator(1, 2, sample, "x")) for sample in range(4)]
    assert torch.equal(draws, torch.stack(alone))
    assert len({row.sum().item() for row in draws}) == 4
