"""The average of the critic in closed form, in both ways of storing it."""

import pytest
import torch
from torch import nn

from stage2_distill.model.split_float32 import join_master
from stage2_distill.optim.ema import CriticAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_weighted_mean_of_the_critics(dtype: torch.dtype) -> None:
    """0.9^3 w0 + 0.1 (0.9^2 w1 + 0.9 w2 + w3); bf16 loses nothing, because the other bits are stored beside it."""
    draws = torch.Generator().manual_seed(0)
    critics = [torch.randn(4, 4, generator=draws) for _ in range(4)]
    present, net = iter(critics), nn.Linear(4, 4, bias=False).to(dtype)
    average = CriticAverage(net, lambda x_t, sigma, condition: x_t, lambda: [("weight", next(present))], decay=0.9)
    for _ in critics[1:]:
        average.update()
    expected = 0.729 * critics[0] + 0.1 * (0.81 * critics[1] + 0.9 * critics[2] + critics[3])
    state = average.state_tensors()
    stored = state["weight"].detach()
    found = stored if dtype == torch.float32 else join_master(stored, state["weight.remainder"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not net.weight.requires_grad
    assert set(state) == ({"weight"} if dtype == torch.float32 else {"weight", "weight.remainder"})
