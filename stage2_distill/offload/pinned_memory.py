"""Pinned host memory for tensors that are offloaded from a GPU."""

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SLAB_BYTES, TOUCH_BYTES, ALIGNMENT = 1 << 30, 32 << 20, 512  # bytes
TOUCH_THREADS = 16  # threads


class PinnedPool:
    """Where tensors are to live: in pinned host memory, if they are offloaded from a GPU, else where they are.

    Of a sharded tensor this rank's part lives there, as a plain one: only for ranks that each hold the whole.
    They share slabs: torch would round each request up to a power of two, for weights half as much again.
    """

    def __init__(self, *, offload: bool, slab: int = SLAB_BYTES) -> None:
        self.offload, self.slab_bytes = offload, slab
        self.slab = torch.empty(0, dtype=torch.uint8)
        self.slab_used = 0

    def place_tensor(self, value: Tensor) -> Tensor:
        """The tensor itself, or its copy in host memory."""
        if not (self.offload and value.is_cuda):
            return value
        return self.copy_into_slab(value.to_local() if isinstance(value, DTensor) else value)

    def copy_into_slab(self, value: Tensor) -> Tensor:
        """A copy of a tensor in a slab."""
        return self.take_bytes(value.nbytes).view(value.dtype).view(value.shape).copy_(value)

    def take_bytes(self, size: int) -> Tensor:
        """Some bytes of a slab."""
        if self.slab_used + size > self.slab.numel():
            self.slab, self.slab_used = allocate_pinned(max(self.slab_bytes, size)), 0
        view = self.slab[self.slab_used : self.slab_used + size]
        self.slab_used += -(-size // ALIGNMENT) * ALIGNMENT
        return view


def allocate_pinned(size: int) -> Tensor:
    """Some bytes of pinned host memory.

    Torch's come at 1 GB/s, because one thread touches them first; here many do.
    """
    memory = numpy.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), numpy.uint8)

    def touch_pages(start: int) -> None:
        memory[start : start + TOUCH_BYTES] = 0  # other threads run meanwhile

    with ThreadPoolExecutor(TOUCH_THREADS) as pool:
        list(pool.map(touch_pages, range(0, size, TOUCH_BYTES)))
    if torch.cuda.is_available():
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        code = int(runtime.cudaHostRegister(address, size, 0))
        if code != 0:
            raise RuntimeError(f"{size} bytes of host memory could not be pinned: CUDA error {code}")
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory)


def aligned_bytes(value: Tensor) -> int:
    """Bytes of a tensor with what alignment adds."""
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT
