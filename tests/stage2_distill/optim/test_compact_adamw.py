"""The compact optimizer against torch's AdamW on float32 masters."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stage2_distill.model.split_float32 import join_master, split_master
from stage2_distill.optim.compact_adamw import CompactAdamW
from stage2_distill.optim.quantized_moment import dequantize_blocks, hashed_uniform, quantize_blocks
from tests.forked import run_python

SETTINGS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(moment: str, **changes: float) -> tuple[nn.Linear, CompactAdamW, nn.Linear, torch.optim.AdamW]:
    """A bf16 layer with our optimizer, and a float32 layer of the same weights with torch's."""
    settings = SETTINGS | changes
    full = nn.Linear(128, 24)
    with torch.no_grad():
        full.weight.copy_(normal(24, 128, seed=1))
        full.bias.fill_(0.1)
    half = nn.Linear(128, 24, dtype=torch.bfloat16)
    compact = CompactAdamW(half, settings | {"beta2": 0.999}, moment=moment)
    with torch.no_grad():
        for mine, theirs in zip(half.parameters(), full.parameters(), strict=True):
            weight, remainder = split_master(theirs.data)
            mine.copy_(weight)
            compact.state[mine]["remainder"].copy_(remainder)
    return half, compact, full, torch.optim.AdamW(full.parameters(), betas=(0.0, 0.999), foreach=False, **settings)


def masters(net: nn.Module, optimizer: CompactAdamW) -> list[Tensor]:
    return list(dict(optimizer.master_weights()).values())


def give_gradients(half: nn.Module, full: nn.Module, seed: int) -> None:
    """The same bf16 gradients to both, of scales that differ by parameter and step."""
    for place, (mine, theirs) in enumerate(zip(half.parameters(), full.parameters(), strict=True)):
        mine.grad = (10.0 ** (place - seed % 5) * normal(*mine.shape, seed=seed)).bfloat16()
        theirs.grad = mine.grad.float()


def test_split_and_join_are_exact() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halfway = torch.arange(1 << 16, dtype=torch.int32) * 65536 + 32768
    master = torch.cat([bits, halfway]).view(torch.float32)
    master = master[master.abs() < 3e38]
    weight, remainder = split_master(master)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    assert ((weight.double() - master).abs() <= (master.bfloat16().double() - master).abs()).all(), "nearest"


def test_1000_steps_leave_the_masters_of_float32_adamw() -> None:
    half, compact, full, adamw = pair("float32")
    for step in range(1000):
        give_gradients(half, full, step)
        limit = 10.0 if step % 2 else 1e-3
        norm = torch.nn.utils.clip_grad_norm_(full.parameters(), limit)
        assert compact.clip_gradients(limit).item() == pytest.approx(norm.item(), rel=1e-6)
        compact.grad_factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # the sum's order aside, all bits agree
        compact.step()
        adamw.step()
    for mine, theirs in zip(masters(half, compact), full.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(half.parameters(), masters(half, compact), strict=True))


def test_8_bit_second_moments_move_masters_alike() -> None:
    """After 1,000 steps the way that each weight has gone differs from float32's by at most a tenth of its length."""
    half, compact, full, adamw = pair("8bit")
    start = [p.detach().clone() for p in full.parameters()]
    for step in range(1000):
        give_gradients(half, full, step)
        compact.step()
        adamw.step()
    for mine, theirs, first in zip(masters(half, compact), full.parameters(), start, strict=True):
        assert ((mine - theirs).norm() / (theirs - first).norm()).item() < 0.1
    assert torch.equal(masters(half, compact)[1], full.bias), "a vector keeps its second moment in float32"


def test_a_small_step_is_not_lost() -> None:
    """At 5e-7 a step is 1/1000 of bf16's distance at 0.1; float32 masters move by exactly what float32 moves."""
    half, compact, full, adamw = pair("float32", lr=5e-7)
    for _ in range(20):
        for mine, theirs in zip(half.parameters(), full.parameters(), strict=True):
            mine.grad, theirs.grad = torch.ones_like(mine), torch.ones_like(theirs)
        compact.step()
        adamw.step()
    assert torch.equal(masters(half, compact)[1], full.bias)
    assert (full.bias - 0.1).mean().item() == pytest.approx(-20 * 5e-7, rel=0.01)
    assert (half.bias == torch.tensor(0.1).bfloat16()).all(), "bf16 alone has not moved"


def test_8_bit_codes() -> None:
    value = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-30, 34)[:, None]
    value[0, :7] = 0
    codes, tops = quantize_blocks(value, hashed_uniform(4096, torch.tensor(0), torch.tensor(1)).view(64, 64))
    found = dequantize_blocks(codes, tops)
    assert (found[0, :7] == 0).all()
    there = value > value.amax(dim=1, keepdim=True) * 2.0**-15
    assert (found[there] / value[there]).log2().abs().max() < 1 / 16
    floor = value.amax(dim=1, keepdim=True) * 2.0**-16
    assert (found[(value > 0) & ~there] > 0.9 * floor.expand_as(found)[(value > 0) & ~there]).all()


def test_rounding_by_chance_keeps_the_mean() -> None:
    """A thousandth is less than one code: the average of 8-bit moments still follows, over many elements."""
    count, parameter = 1 << 14, torch.zeros(256, 64, dtype=torch.bfloat16)
    net = nn.ParameterList([parameter])
    optimizer = CompactAdamW(net, {"lr": 0.0, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0})
    for _ in range(200):
        net[0].grad = torch.ones_like(net[0])
        optimizer.step()
    state = optimizer.state[net[0]]
    moment = dequantize_blocks(state["exp_avg_sq"].view(-1, 64), state["exp_avg_sq_top"].view(-1))
    assert moment.numel() == count
    assert moment.mean().item() == pytest.approx(1 - 0.999**200, rel=0.02)


def test_chances_depend_on_place_and_step_alone() -> None:
    whole = hashed_uniform(1000, torch.tensor(0), torch.tensor(5))
    assert torch.equal(whole[300:], hashed_uniform(700, torch.tensor(300), torch.tensor(5)))
    assert not torch.equal(whole, hashed_uniform(1000, torch.tensor(0), torch.tensor(6)))
    assert whole.mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.corrcoef(torch.stack([whole[1:], whole[:-1]]))[0, 1].abs() < 0.1


def test_two_ranks_go_on_with_one_ranks_state_bit_for_bit() -> None:
    done = run_python(Path(__file__).with_name("compact_ranks.py"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gradients_of_many_batches_add_up_in_float32() -> None:
    """256 + 1 is 256 in bf16."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    compact = CompactAdamW(net, SETTINGS | {"beta2": 0.999}, accumulate=True)
    for value in (256.0, 1.0):
        net(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert net.weight.grad is None
    assert compact.clip_gradients(1e6).item() == 257
    compact.step()
    compact.zero_grad()
    assert compact.local_gradients() == {}


@pytest.mark.parametrize("moment", ["float32", "8bit"])
def test_a_step_that_is_not_fine_changes_nothing(moment: str) -> None:
    half, compact, full, _ = pair(moment)
    give_gradients(half, full, 0)
    compact.step()
    kept = [*masters(half, compact), *(compact.state[p]["exp_avg_sq"].clone() for p in half.parameters())]
    for fine in (False, True):
        give_gradients(half, full, 1)
        compact.clip_gradients(1.0)
        assert compact.step_if_finite(torch.tensor(fine))
        found = [*masters(half, compact), *(compact.state[p]["exp_avg_sq"] for p in half.parameters())]
        assert all(torch.equal(a, b) is not fine for a, b in zip(kept, found, strict=True))
