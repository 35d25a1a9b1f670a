"""What a training run computes on. Imports no torch."""

from dataclasses import dataclass

CPU = "cpu"  # as a device


@dataclass(frozen=True)
class Machine:
    """What the ranks of a run compute on."""

    ranks: int
    device: str  # name of the GPU, or cpu
    total_bytes: float  # of a GPU
    kernel: str  # of attention, as `cards` names it, or torch's own

    @property
    def has_gpu(self) -> bool:
        """Whether the ranks compute on GPUs."""
        return self.device != CPU
