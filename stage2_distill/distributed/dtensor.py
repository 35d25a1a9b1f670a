"""Sharded tensors (DTensor): this rank's part, its offset, and norms over all parts."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def sharded_like(value: Tensor, local_part: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """A tensor sharded as `value` is, with this rank's part given; on `mesh`, by default that of `value`."""
    if not isinstance(value, DTensor):
        return local_part
    mesh = value.device_mesh if mesh is None else mesh
    # shape and stride are passed because from_local assumes equal parts, and the last rank's may be smaller
    return DTensor.from_local(local_part, mesh, value.placements, shape=value.shape, stride=value.stride())


def first_element_index(parameter: Tensor) -> Tensor:
    """Index of this rank's first element in the flattened whole parameter, int64, on the parameter's device."""
    start = 0
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        start = offset[0] * parameter.shape[1:].numel()  # FSDP shards the first dimension only
    return torch.tensor(start, device=local_tensor(parameter).device)


def global_grad_norm(grads: list[Tensor], parameter: Tensor) -> Tensor:
    """Norm of all gradients together, over the shards of `parameter`, summed in float32 without float32 copies."""
    squares = torch.stack(torch._foreach_norm(grads, 2, torch.float32)).square().sum()
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))  # the last dimension shards, others replicate
    return squares.sqrt()
