"""Pinned memory for offloaded tensors; their copies to and from a GPU are tested in test_fused_kernels.py."""

import pytest
import torch

from stage2_distill.checkpointing.staging import allocate_host_buffers
from stage2_distill.offload import pinned_memory, prefetch


def test_tensors_share_slabs_and_keep_values(monkeypatch: pytest.MonkeyPatch) -> None:
    slab_sizes: list[int] = []

    def allocate_unpinned(size: int) -> torch.Tensor:
        slab_sizes.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(pinned_memory, "allocate_pinned", allocate_unpinned)
    pool = pinned_memory.PinnedPool(offload=True, slab=4096)
    values = [torch.randn(n, 7).to(dtype) for n in (3, 40, 100, 1) for dtype in (torch.float32, torch.int16)]
    copies = [pool.copy_into_slab(value) for value in values]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(copies, values, strict=True))
    copies[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(copies[1:], values[1:], strict=True)), "they do not overlap"
    assert len(slab_sizes) < len(values)
    assert sum(slab_sizes) < 2 * 4096 + sum(v.numel() * v.element_size() + 512 for v in values)


def test_tensors_on_the_cpu_stay() -> None:
    value = torch.ones(3)
    assert pinned_memory.PinnedPool(offload=True).place_tensor(value) is value
    assert list(prefetch.prefetched_groups([{"a": value}], torch.device("cpu")))[0]["a"] is value


def test_memory_is_zero_and_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "TOUCH_BYTES", 1000)
    assert not pinned_memory.allocate_pinned(4321).any()
    sizes: list[int] = []
    monkeypatch.setattr(
        pinned_memory, "allocate_pinned", lambda size: sizes.append(size) or torch.zeros(size, dtype=torch.uint8)
    )
    buffers: dict[str, torch.Tensor] = {}
    state = {"a": torch.ones(100), "b": torch.ones(3, dtype=torch.uint8), "c": torch.ones(())}
    for _ in range(2):
        allocate_host_buffers(state, buffers)
    assert sizes == [512 * 3]
    assert [buffer.nbytes for buffer in buffers.values()] == [400, 3, 4]
