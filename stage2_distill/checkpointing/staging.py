"""Copies of training's state in host memory, made while training goes on.

Nothing of a role's state changes before its next optimizer step, so that only this must wait for its copies. The
average changes after the student's.
Memory that is touched for the first time takes ten times as long to write: it is kept from one checkpoint to the next,
pinned, so that a GPU copies there by itself.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.offload.pinned_memory import SLAB_BYTES, PinnedPool, aligned_bytes

COPY_THREADS = 8  # threads, for what lives in host memory
HostBuffers = dict[str, Tensor]  # bytes in host memory, by the name of what is copied there


def build_cpu_mesh(ranks: RankContext) -> DeviceMesh:
    """The ranks' mesh in host memory."""
    names = ranks.mesh.mesh_dim_names
    return ranks.mesh if ranks.device.type == "cpu" else init_device_mesh("cpu", ranks.mesh.shape, mesh_dim_names=names)


def role_of_tensor(name: str) -> str:
    """Whose optimizer step is the first that may change this tensor of the state."""
    return CRITIC if name.startswith(CRITIC) else STUDENT


def allocate_host_buffers(tensors: Mapping[str, Tensor], buffers: HostBuffers) -> None:
    """Memory for copies of `tensors`, touched and pinned."""
    new = {name: local_tensor(value) for name, value in tensors.items() if name not in buffers}
    pool = PinnedPool(offload=True, slab=min(SLAB_BYTES, sum(map(aligned_bytes, new.values()))))
    buffers |= {name: pool.take_bytes(value.nbytes) for name, value in new.items()}


class StagedState:
    """The state as it is now, once the device has caught up; sharded as the tensors are, in `rooms`.

    The tensors of the role that is updated `first` are copied first.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], cpu_mesh: DeviceMesh, host_buffers: HostBuffers, *, first: str
    ) -> None:
        self.tensors, self.cpu_mesh, self.host_buffers = tensors, cpu_mesh, host_buffers
        self.names = sorted(tensors, key=lambda name: role_of_tensor(name) != first)
        self.copy_events: dict[str, torch.cuda.Event] = {}  # by role
        if any(local_tensor(value).is_cuda for value in tensors.values()):
            self.copy_from_gpu()
        executor = ThreadPoolExecutor(COPY_THREADS)
        on_host = [name for name in self.names if not local_tensor(tensors[name]).is_cuda]
        self.copies: dict[str, Future[None]] = {name: executor.submit(self.copy_from_host, name) for name in on_host}
        executor.shutdown(wait=False)

    def copy_from_gpu(self) -> None:
        """Start copying what lives on a GPU, beside its arithmetic."""
        copy_stream = torch.cuda.Stream()
        copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copy_stream):
            for name in self.names:
                part = local_tensor(self.tensors[name]).detach()
                if part.is_cuda:
                    self.buffer_view(name).copy_(part, non_blocking=True)
                    self.copy_events[role_of_tensor(name)] = copy_stream.record_event()

    def copy_from_host(self, name: str) -> None:
        """Copy one tensor that lives in host memory."""
        buffer, value = self.buffer_view(name), local_tensor(self.tensors[name]).detach()
        buffer.view(-1).view(torch.uint8).numpy()[:] = value.contiguous().view(-1).view(torch.uint8).numpy()

    def buffer_view(self, name: str) -> Tensor:
        """Where the copy of a tensor is, or this rank's part of it."""
        part = local_tensor(self.tensors[name])
        return self.host_buffers[name].view(part.dtype).view(part.shape)

    def is_pending(self, role: str) -> bool:
        """Whether copies of what the role's next step changes are still being made."""
        arrived = self.copy_events.get(role)
        return bool(self.pending_copies(role)) or (arrived is not None and not arrived.query())

    def pending_copies(self, role: str) -> list[Future[None]]:
        """Copies from host memory that have not been made."""
        return [copy for name, copy in self.copies.items() if role_of_tensor(name) == role and not copy.done()]

    def wait_for_role(self, role: str) -> None:
        """Let what the device does next wait for the role's copies; this thread for those from host memory alone."""
        wait(self.pending_copies(role))
        if role in self.copy_events:
            torch.cuda.current_stream().wait_event(self.copy_events[role])

    def wait_for_all(self) -> dict[str, Tensor]:
        """Wait for all copies."""
        for arrived in self.copy_events.values():
            arrived.synchronize()
        for copy in self.copies.values():
            copy.result()
        return {name: self.sharded_copy(name) for name in self.tensors}

    def sharded_copy(self, name: str) -> Tensor:
        """The copy of a tensor, sharded as it is."""
        buffer, value = self.buffer_view(name), self.tensors[name]
        if not isinstance(value, DTensor):
            return buffer
        return DTensor.from_local(buffer, self.cpu_mesh, value.placements, shape=value.shape, stride=value.stride())
