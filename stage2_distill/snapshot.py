"""Copies of training's state in host memory, made by threads while training goes on.

Nothing of a role's state changes before its next optimizer step, so that only this must wait for its copies. The
average changes after the student's.
Memory that is touched for the first time takes ten times as long to write: it is kept from one checkpoint to the next.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from stage2_distill.compact import local
from stage2_distill.parallel import Ranks
from stage2_distill.schedule import CRITIC, STUDENT

COPIERS = 8  # threads
CHUNK = 32 << 20  # bytes of pinned memory that a thread copies through
Rooms = dict[str, Tensor]  # bytes in host memory, by the name of what is copied there


def host_mesh(ranks: Ranks) -> DeviceMesh:
    """The ranks' mesh in host memory."""
    names = ranks.mesh.mesh_dim_names
    return ranks.mesh if ranks.device.type == "cpu" else init_device_mesh("cpu", ranks.mesh.shape, mesh_dim_names=names)


def role_of(name: str) -> str:
    """Whose optimizer step is the first that may change this tensor of the state."""
    return CRITIC if name.startswith(CRITIC) else STUDENT


def make_rooms(tensors: Mapping[str, Tensor], rooms: Rooms) -> None:
    """Memory for copies of `tensors`, touched."""

    def make(name: str) -> None:
        if name not in rooms:
            home = torch.empty(local(tensors[name]).nbytes, dtype=torch.uint8)
            home.numpy()[:] = 0  # torch would use all cores for each
            rooms[name] = home

    with ThreadPoolExecutor(COPIERS) as pool:
        list(pool.map(make, tensors))


class Snapshot:
    """The state as it is now, once the device has caught up; sharded as the tensors are, in `rooms`.

    The tensors of the role that is updated `first` are copied first.
    """

    def __init__(self, tensors: Mapping[str, Tensor], host: DeviceMesh, rooms: Rooms, *, first: str) -> None:
        self.host, self.rooms = host, rooms
        self.own = threading.local()  # a thread's stream and pinned memory
        self.begun = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        pool = ThreadPoolExecutor(COPIERS)
        names = sorted(tensors, key=lambda name: role_of(name) != first)
        self.copies: dict[str, Future[Tensor]] = {name: pool.submit(self.copy, name, tensors[name]) for name in names}
        pool.shutdown(wait=False)

    def missing(self, role: str) -> list[Future[Tensor]]:
        """Copies of what the role's next step changes that are not made yet."""
        return [copy for name, copy in self.copies.items() if role_of(name) == role and not copy.done()]

    def result(self) -> dict[str, Tensor]:
        """Wait for all copies."""
        return {name: copy.result() for name, copy in self.copies.items()}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """A copy of one tensor."""
        part = local(value).detach()
        flat, home = part.contiguous().view(-1).view(torch.uint8), self.rooms[name]
        if part.is_cuda:
            self.download(flat, home)
        else:
            home.numpy()[:] = flat.numpy()
        home = home.view(part.dtype).view(part.shape)
        if not isinstance(value, DTensor):
            return home
        return DTensor.from_local(home, self.host, value.placements, shape=value.shape, stride=value.stride())

    def download(self, source: Tensor, home: Tensor) -> None:
        """Copy bytes from a GPU on a stream of this thread."""
        if not hasattr(self.own, "stream"):
            torch.cuda.set_device(source.device)
            self.own.stream = torch.cuda.Stream(source.device)
            self.own.pinned = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
        stream: torch.cuda.Stream = self.own.stream
        with torch.cuda.stream(stream):
            assert self.begun is not None
            stream.wait_event(self.begun)
            for start in range(0, source.numel(), CHUNK):
                part = source[start : start + CHUNK]
                here = self.own.pinned[: part.numel()]
                here.copy_(part, non_blocking=True)
                stream.synchronize()
                home.numpy()[start : start + CHUNK] = here.numpy()
