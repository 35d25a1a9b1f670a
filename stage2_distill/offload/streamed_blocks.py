"""A model whose blocks stay in host memory and pass through the GPU, one after the other, while it computes.

The tensors of block n are on the GPU during its forward pass; those of the next two are copied meanwhile, into the
staging buffers of prefetch.py. So the GPU holds three blocks and what is outside the blocks.
"""

from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice

import torch
from torch import nn

from common.device import OffloadedTensors
from stage2_distill.offload.pinned_memory import PinnedPool
from stage2_distill.offload.prefetch import TensorGroup, copy_streams, prefetched_groups


class StreamedModule:
    """Streams the blocks of a model that is still on the CPU; on a CPU they simply stay.

    Its other tensors move with `move_to`, as those of `OffloadedTensors`. The numbers are those of the model on the
    GPU: equal tensors at equal alignment. ValueError if the host memory cannot be pinned.
    """

    def __init__(self, module: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device, pool = device, PinnedPool(offload=True)
        self.blocks = [all_tensors(block) for block in blocks]
        streamed = {id(tensor) for block in self.blocks for tensor in block.values()}
        self.resident = OffloadedTensors(one for one in all_tensors(module).values() if id(one) not in streamed)
        self.stream: Iterator[TensorGroup] | None = None
        self.next_index = 0  # of the block that `stream` will yield
        self.host_groups = list[TensorGroup]()
        for index, block in enumerate(blocks):
            self.host_groups.append(copy_to_host(self.blocks[index], pool, device))
            point_to(self.blocks[index], self.host_groups[index])  # frees the block's own memory
            block.register_forward_pre_hook(partial(self._enter_block, index))
            # also after an error, or the block would keep the memory of a buffer that others fill
            block.register_forward_hook(partial(self._leave_block, index), always_call=True)

    def move_to(self, device: torch.device) -> None:
        """Move what is outside the blocks; a move to the CPU also frees the buffers on the GPU."""
        if device.type == "cpu":
            self._free_buffers()
        self.resident.move_to(device)

    def _enter_block(self, index: int, *_: object) -> None:
        if self.stream is None or index != self.next_index:  # the first pass, or the last one ended by an error
            self._free_buffers()
            groups = islice(cycle(self.host_groups), index, None)  # round and round: the next step starts at once
            self.stream = prefetched_groups(groups, self.device, write_back=False)
        point_to(self.blocks[index], next(self.stream))
        self.next_index = (index + 1) % len(self.blocks)

    def _leave_block(self, index: int, *_: object) -> None:
        point_to(self.blocks[index], self.host_groups[index])

    def _free_buffers(self) -> None:
        if self.stream is not None and self.device.type == "cuda":  # a block may still be arriving in them
            torch.cuda.current_stream(self.device).wait_stream(copy_streams(self.device)[0])
        self.stream = None


def all_tensors(module: nn.Module) -> TensorGroup:
    """Parameters and buffers of a module by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def point_to(tensors: TensorGroup, values: TensorGroup) -> None:
    """Let tensors have the memory of others."""
    for name, tensor in tensors.items():
        tensor.data = values[name].data


def copy_to_host(group: TensorGroup, pool: PinnedPool, device: torch.device) -> TensorGroup:
    """Copies in pinned memory of tensors on the CPU, for streaming to `device`; a CPU takes the tensors themselves."""
    if device.type == "cpu":
        return {name: value.data for name, value in group.items()}
    try:
        return {name: pool.copy_into_slab(value.data) for name, value in group.items()}
    except torch.OutOfMemoryError as error:
        raise ValueError(f"vram=12gb: {error}, or a larger card and --vram 16gb") from error
