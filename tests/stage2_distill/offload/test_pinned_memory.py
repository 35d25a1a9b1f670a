"""Where offloaded tensors live; that they visit a GPU rightly is tested in test_fused_kernels.py."""

import pytest
import torch

from stage2_distill.checkpointing.staging import allocate_host_buffers
from stage2_distill.offload import pinned_memory, prefetch


def test_tensors_share_slabs_and_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[int] = []

    def plain(size: int) -> torch.Tensor:
        slabs.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(pinned_memory, "allocate_pinned", plain)
    host = pinned_memory.PinnedPool(offload=True, slab=4096)
    values = [torch.randn(n, 7).to(dtype) for n in (3, 40, 100, 1) for dtype in (torch.float32, torch.int16)]
    homes = [host.copy_into_slab(value) for value in values]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(homes, values, strict=True))
    homes[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(homes[1:], values[1:], strict=True)), "they do not overlap"
    assert len(slabs) < len(values)
    assert sum(slabs) < 2 * 4096 + sum(v.numel() * v.element_size() + 512 for v in values)


def test_what_is_not_on_a_gpu_stays() -> None:
    value = torch.ones(3)
    assert pinned_memory.PinnedPool(offload=True).place_tensor(value) is value
    assert list(prefetch.prefetched_groups([{"a": value}], torch.device("cpu")))[0]["a"] is value


def test_memory_is_asked_for_once_and_zero_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "TOUCH_BYTES", 1000)
    assert not pinned_memory.allocate_pinned(4321).any()
    asked: list[int] = []
    monkeypatch.setattr(
        pinned_memory, "allocate_pinned", lambda size: asked.append(size) or torch.zeros(size, dtype=torch.uint8)
    )
    rooms: dict[str, torch.Tensor] = {}
    state = {"a": torch.ones(100), "b": torch.ones(3, dtype=torch.uint8), "c": torch.ones(())}
    for _ in range(2):
        allocate_host_buffers(state, rooms)
    assert asked == [512 * 3]
    assert [room.nbytes for room in rooms.values()] == [400, 3, 4]
