"""Blocks that pass through the GPU: the same numbers as a model that stays there, after errors too, in one graph."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from stage2_distill.model.activation_checkpoint import block_runner
from stage2_distill.model.layers import ExecutionPlan, maybe_compile
from stage2_distill.model.wan import load_transformer
from stage2_distill.offload import streamed_blocks
from stage2_distill.offload.prefetch import STAGING_BUFFERS, TensorGroup
from stage2_distill.offload.streamed_blocks import StreamedModule
from tests.tiny_models import TEXT_DIM

CPU = torch.device("cpu")
BLOCKS, WIDTH, BATCH = 5, 16, 3


class Tower(nn.Module):
    """Blocks between two layers; a block has a buffer too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh()) for _ in range(BLOCKS)
        )
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, *, fails_at: int | None = None) -> Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            x = block(x if index != fails_at else x[:, :1])  # a wrong shape: an error inside the block
        return self.last(x)


def reuse_buffers(groups: Iterable[TensorGroup], device: torch.device, *, write_back: bool) -> Iterator[TensorGroup]:
    """Stands for `prefetched_groups` of a GPU: each group is in memory that later groups overwrite."""
    assert not write_back
    buffers = cycle([dict[str, Tensor]() for _ in range(STAGING_BUFFERS)])
    for buffer, group in zip(buffers, groups, strict=False):
        for name, value in group.items():
            buffer.setdefault(name, torch.empty_like(value)).copy_(value)
        yield buffer
        for value in buffer.values():
            value.zero_()


def test_each_block_computes_with_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_blocks, "prefetched_groups", reuse_buffers)
    torch.manual_seed(0)
    tower, x = Tower(), torch.randn(BATCH, WIDTH)
    state, expected = {name: value.clone() for name, value in tower.state_dict().items()}, tower(x)
    streamed = StreamedModule(tower, tower.blocks, CPU)
    assert len(streamed.resident.tensors) == 4  # weights and biases outside the blocks
    for action in ("first", "round again", "error", "after it", "moved away"):
        if action == "error":
            with pytest.raises(RuntimeError):
                tower(x, fails_at=2)
            continue
        if action == "moved away":
            streamed.move_to(CPU)
            assert streamed.stream is None
        assert torch.equal(tower(x), expected), action
    # between passes a block has its own memory, so that a saved or moved model is complete
    assert all(torch.equal(value, state[name]) for name, value in tower.state_dict().items())


def test_one_graph_serves_all_blocks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled block is called with tensors in another buffer each time, and is not compiled again for that."""
    counter = CompileCounter()
    monkeypatch.setattr(streamed_blocks, "prefetched_groups", reuse_buffers)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    net = load_transformer(model, torch.float32, ExecutionPlan(kernel="math", compiled=True)).requires_grad_(False)
    assert len(net.blocks) > 1
    text, times = torch.ones(1, 9, TEXT_DIM), torch.tensor([[0.0, 500.0]])
    forward = partial(net, torch.ones(1, 48, 3, 4, 6), times, text, return_dict=False)
    with torch.no_grad():
        (expected,) = forward()
        graphs = counter.frame_count
        StreamedModule(net, net.blocks, CPU)
        for _ in range(2):
            (velocity,) = forward()
            assert torch.equal(velocity, expected)
    for cached in (block_runner, maybe_compile):  # other tests compile under this plan with their own backend
        cached.cache_clear()
    assert counter.frame_count == graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_three_blocks() -> None:
    """The same bits, also when the CPU runs ahead, and the memory is free once the model has moved away."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    blocks = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(12)).requires_grad_(False)
    tower, x = nn.Sequential(nn.Linear(2048, 2048).requires_grad_(False), *blocks), torch.randn(4096, 2048).to(device)
    tower.to(device)
    expected = [x]
    for _ in range(8):
        expected.append(torch.tanh(tower(expected[-1])))
    tower.to("cpu")
    streamed = StreamedModule(tower, blocks, device)
    streamed.move_to(device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(8):
        x = torch.tanh(tower(x))
    assert torch.equal(x, expected[-1])  # only here, because it waits for the GPU
    held = torch.cuda.memory_allocated() - before
    assert 2 * 2048**2 * 4 < held < 3.5 * 2048**2 * 4 + x.nbytes * 2
    streamed.move_to(CPU)
    assert torch.cuda.memory_allocated() < before + x.nbytes + 2**20
    assert all(parameter.device.type == "cpu" for parameter in tower.parameters())
