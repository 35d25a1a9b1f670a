"""Pinned host memory for tensors that are offloaded from a GPU."""

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from torch import Tensor

from stage2_distill.distributed.dtensor import local_tensor

SLAB_BYTES, TOUCH_BYTES = 1 << 30, 32 << 20
ALIGNMENT = 512  # bytes, as torch's allocator for GPU memory
TOUCH_THREADS = 16


class PinnedPool:
    """Moves tensors to pinned host memory, in slabs that they share, if `offload` is set."""

    def __init__(self, *, offload: bool, slab: int = SLAB_BYTES) -> None:
        # torch rounds each pinned allocation up to a power of two: for weights, about 50 % overhead without slabs
        self.offload, self.slab_bytes = offload, slab
        self.slab = torch.empty(0, dtype=torch.uint8)
        self.slab_used = 0

    def place_tensor(self, value: Tensor) -> Tensor:
        """A copy in pinned memory if `value` is on a GPU and the pool offloads, else `value` itself."""
        # A DTensor becomes the plain tensor of its local part: only networks that are not sharded may be offloaded.
        return self.copy_into_slab(local_tensor(value)) if self.offload and value.is_cuda else value

    def copy_into_slab(self, value: Tensor) -> Tensor:
        """A copy of a tensor in a slab."""
        return self.take_bytes(value.nbytes).view(value.dtype).view(value.shape).copy_(value)

    def take_bytes(self, size: int) -> Tensor:
        """A uint8 tensor of `size` unused bytes of a slab."""
        if self.slab_used + size > self.slab.numel():
            self.slab, self.slab_used = allocate_pinned(max(self.slab_bytes, size)), 0
        view = self.slab[self.slab_used : self.slab_used + size]
        self.slab_used += aligned_bytes(view)
        return view


def allocate_pinned(size: int) -> Tensor:
    """A uint8 tensor of `size` zeros in pinned host memory; OutOfMemoryError if CUDA cannot pin it."""
    # torch pins at about 1 GB/s, as one thread takes all page faults; here many threads touch the pages first
    memory = numpy.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), numpy.uint8)

    def touch_pages(start: int) -> None:
        memory[start : start + TOUCH_BYTES] = 0  # numpy releases the GIL

    with ThreadPoolExecutor(TOUCH_THREADS) as pool:
        list(pool.map(touch_pages, range(0, size, TOUCH_BYTES)))
    if torch.cuda.is_available():
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        if (code := int(runtime.cudaHostRegister(address, size, 0))) != 0:
            raise torch.OutOfMemoryError(
                f"{size} bytes of host memory could not be pinned (CUDA error {code}); use a machine with more"
            )
        # not at exit: CUDA may be shut down by then, and the process gives up its memory anyway
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory)


def aligned_bytes(value: Tensor) -> int:
    """Bytes of a tensor, rounded up to the alignment."""
    return -(-value.nbytes // ALIGNMENT) * ALIGNMENT
