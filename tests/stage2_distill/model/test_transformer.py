"""The forward passes of `WanTransformer` against diffusers' own, and every execution plan against the default one."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging
from einops import repeat
from torch.utils._python_dispatch import TorchDispatchMode

from stage2_distill.model.attention import ATTENTION_OPS
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer, convert_transformer
from tests.tiny_models import TEXT_DIM

SHAPE = (2, 48, 3, 4, 6)
TIMES = {True: torch.tensor([[0.0, 937.5], [0.0, 20.0]]), False: torch.tensor([[937.5], [20.0]])}
PLANS = [
    ExecutionPlan(kernel="math", checkpointing="off"),
    ExecutionPlan(checkpointing="full"),
    ExecutionPlan(checkpointing="selective-mlp"),
    ExecutionPlan(checkpointing="selective-mlp", compiled=True),
    ExecutionPlan(checkpointing="offload"),
    ExecutionPlan(checkpointing="offload", compiled=True),
    ExecutionPlan(checkpointing="selective"),
    ExecutionPlan(checkpointing="selective", compiled=True),
]
logging.disable_progress_bar()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(net: WanTransformer3DModel, times: torch.Tensor) -> dict[str, torch.Tensor]:
    """Velocity, and the gradients of a random projection of it by the input and every parameter."""
    x = normal(*SHAPE, seed=1).requires_grad_()
    net.zero_grad()
    (out,) = net(
        hidden_states=x, timestep=times, encoder_hidden_states=normal(2, 512, TEXT_DIM, seed=2), return_dict=False
    )
    (out * normal(*SHAPE, seed=3)).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.fixture(scope="module")
def theirs(model: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(model / "transformer")


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = (ours[name] - value).norm() / value.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("first_frame", [True, False])
def test_two_times_equal_one_time_a_token(theirs: WanTransformer3DModel, first_frame: bool) -> None:
    times = TIMES[first_frame]
    tokens = repeat(times[:, -1], "b -> b n", n=18).clone()
    if first_frame:
        tokens[:, :6] = 0
    expected = gradients(theirs, tokens)
    ours = convert_transformer(copy.deepcopy(theirs))
    assert_close(gradients(ours, times), expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(gradients(ours, tokens), expected)  # diffusers' own path, for its pipelines


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plans_give_equal_gradients(theirs: WanTransformer3DModel, plan: ExecutionPlan) -> None:
    expected = gradients(convert_transformer(copy.deepcopy(theirs)), TIMES[True])
    assert_close(gradients(convert_transformer(copy.deepcopy(theirs), plan), TIMES[True]), expected)


class OperationCounter(TorchDispatchMode):
    """Counts the attentions and the narrowing matrix products that are computed."""

    calls = 0
    narrowing = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.calls += op in ATTENTION_OPS
        self.narrowing += op is torch.ops.aten.addmm.default and args[1].shape[1] > args[2].shape[1]
        return op(*args, **(kwargs or {}))


def test_kept_results_are_not_recomputed(theirs: WanTransformer3DModel) -> None:
    calls, narrowing = {}, {}
    for keep in ("full", "offload", "selective", "selective-mlp", "off"):
        with OperationCounter() as count:
            gradients(convert_transformer(copy.deepcopy(theirs), ExecutionPlan(checkpointing=keep)), TIMES[True])
        calls[keep], narrowing[keep] = count.calls, count.narrowing
    assert calls == {
        "full": 8,
        "offload": 8,
        "selective": 6,
        "selective-mlp": 6,
        "off": 4,
    }  # two layers, self- and text attention
    assert narrowing["full"] == narrowing["selective"] == narrowing["selective-mlp"] + 2 == narrowing["off"] + 2


def test_saved_network_loads_in_diffusers(theirs: WanTransformer3DModel, tmp_path: Path) -> None:
    net = convert_transformer(copy.deepcopy(theirs))
    assert isinstance(net, WanTransformer)
    net.save_pretrained(tmp_path)
    assert '"_class_name": "WanTransformer3DModel"' in (tmp_path / "config.json").read_text()
    assert type(WanTransformer3DModel.from_pretrained(tmp_path)) is WanTransformer3DModel
