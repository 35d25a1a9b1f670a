"""Stage one of a checkpoint: copies of the training state in host memory, made while training continues.

A role's state changes only in its optimizer step, so only that step waits for the role's copies; the average changes
right after the student's step. The buffers are pinned, so that a GPU copies without the CPU, and are kept for the whole
run: the first write to new memory takes ten times as long as later ones.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stage2_distill.distributed.dtensor import local_tensor, sharded_like
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.offload.pinned_memory import SLAB_BYTES, PinnedPool, aligned_bytes

COPY_THREADS = 8  # for tensors that are in host memory already
HostBuffers = dict[str, Tensor]  # bytes in pinned memory, by the name of the tensor that is copied there


def build_cpu_mesh(ranks: RankContext) -> DeviceMesh:
    """The mesh of the ranks with CPU as its device, for the sharded copies."""
    names = ranks.mesh.mesh_dim_names
    return ranks.mesh if ranks.device.type == "cpu" else init_device_mesh("cpu", ranks.mesh.shape, mesh_dim_names=names)


def role_of_tensor(name: str) -> str:
    """The role whose optimizer step is the first that may change this tensor of the training state."""
    return CRITIC if name.startswith(CRITIC) else STUDENT  # "ema.*" changes with the student


def allocate_host_buffers(tensors: Mapping[str, Tensor], buffers: HostBuffers) -> None:
    """Add pinned buffers for the local parts of those `tensors` that have none in `buffers` yet."""
    new = {name: local_tensor(value) for name, value in tensors.items() if name not in buffers}
    pool = PinnedPool(offload=True, slab=min(SLAB_BYTES, sum(map(aligned_bytes, new.values()))))
    buffers |= {name: pool.take_bytes(value.nbytes) for name, value in new.items()}


class StagedState:
    """Copies of the state as it is at construction; the tensors of the role that is updated `first` come first."""

    def __init__(self, tensors: Mapping[str, Tensor], mesh: DeviceMesh, buffers: HostBuffers, *, first: str) -> None:
        self.tensors, self.cpu_mesh = tensors, mesh
        names = sorted(tensors, key=lambda name: role_of_tensor(name) != first)
        self.parts = {name: local_tensor(tensors[name]).detach() for name in names}  # of this rank
        self.copies = {name: buffers[name].view(p.dtype).view(p.shape) for name, p in self.parts.items()}
        self.gpu_events: dict[str, torch.cuda.Event] = {}  # by role, after its last tensor
        self.host_tasks: dict[str, list[Future[None]]] = {STUDENT: [], CRITIC: []}
        if any(part.is_cuda for part in self.parts.values()):  # on a stream of its own, beside the computation
            self._copy_from_gpu()
        executor = ThreadPoolExecutor(COPY_THREADS)
        for name in (name for name in names if not self.parts[name].is_cuda):
            self.host_tasks[role_of_tensor(name)].append(executor.submit(self.copy_from_host, name))
        executor.shutdown(wait=False)  # the threads end after the last copy

    def _copy_from_gpu(self) -> None:
        copy_stream = torch.cuda.Stream()
        copy_stream.wait_stream(torch.cuda.current_stream())  # the state is final once queued work has ended
        with torch.cuda.stream(copy_stream):
            for name, part in self.parts.items():
                if part.is_cuda:
                    self.copies[name].copy_(part, non_blocking=True)
                    self.gpu_events[role_of_tensor(name)] = copy_stream.record_event()

    def copy_from_host(self, name: str) -> None:
        """Copy one tensor that is in host memory; numpy releases the GIL and works for every dtype seen as bytes."""
        flat_copy, flat_part = self.copies[name].view(-1), self.parts[name].contiguous().view(-1)
        flat_copy.view(torch.uint8).numpy()[:] = flat_part.view(torch.uint8).numpy()

    def is_pending(self, role: str) -> bool:
        """Whether copies of tensors that the role's next step changes are still running."""
        event = self.gpu_events.get(role)
        return not all(task.done() for task in self.host_tasks[role]) or (event is not None and not event.query())

    def wait_for_role(self, role: str) -> None:
        """Make the current stream wait for the role's copies from the GPU, and this thread for those of host memory."""
        wait(self.host_tasks[role])
        if role in self.gpu_events:  # only the stream waits, so the CPU keeps queueing work
            torch.cuda.current_stream().wait_event(self.gpu_events[role])

    def wait_for_all(self) -> dict[str, Tensor]:
        """Wait for all copies; returns them by name, on the CPU, sharded as the originals are."""
        for event in self.gpu_events.values():
            event.synchronize()
        for task in (task for tasks in self.host_tasks.values() for task in tasks):
            task.result()
        return {name: sharded_like(value, self.copies[name], self.cpu_mesh) for name, value in self.tensors.items()}
