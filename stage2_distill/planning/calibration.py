"""Measured iterations against predicted ones: what corrects a plan. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from common.planning.cards import Card, find_card, planned_kernel
from stage2_distill.config import DistillConfig
from stage2_distill.planning.duration import RolloutPasses, iteration_seconds
from stage2_distill.planning.machine import CPU, Machine
from stage2_distill.planning.memory import MemoryEstimate, estimate_memory
from stage2_distill.planning.network_size import TransformerSize

GIB = 2**30


@dataclass(frozen=True)
class MeasuredIteration:
    """One iteration as it ran here."""

    seconds: float
    passes: RolloutPasses  # forward passes of its rollouts


@dataclass(frozen=True)
class Calibration:
    """What two iterations took here, and what the formulas say of them."""

    device: str
    gpus: int
    kernel: str  # of attention, as the table of speeds names it
    total_gib: float  # memory of a GPU, or of the host
    predicted_seconds: float  # of both iterations
    measured_seconds: float
    predicted_gib: float  # peak per GPU, or of the process on a CPU
    measured_gib: float

    @property
    def time_factor(self) -> float:
        """Measured time over predicted time."""
        return self.measured_seconds / self.predicted_seconds

    @property
    def memory_factor(self) -> float:
        """Measured memory over predicted memory."""
        return self.measured_gib / self.predicted_gib

    def correct_card(self, card: Card) -> Card:
        """The card of this machine, with the speeds of `card` as they were measured."""
        return replace(card, name=self.device, memory_gib=self.total_gib, slowdown=self.time_factor, measured=True)

    def correct_memory(self, memory: MemoryEstimate) -> MemoryEstimate:
        """Every part of a GPU's memory times the measured factor; on a CPU all of the process."""
        names = [*memory.gpu_parts, *(["host"] if self.device == CPU else [])]
        return replace(memory, **{name: vars(memory)[name] * self.memory_factor for name in names})

    def format_lines(self) -> Iterator[str]:
        """What was predicted and measured, in words."""
        yield f"calibrated on {self.gpus} x {self.device} by two iterations of one micro-batch:"
        predicted = f"predicted {self.predicted_seconds:.3g} s, times in the plan x {self.time_factor:.3g}"
        if find_card(self.device) is None:
            predicted = "the plan's times follow, as this device is not in the table of speeds"
        yield f"  time: measured {self.measured_seconds:.3g} s; {predicted}"
        predicted = f"predicted {self.predicted_gib:.3g} GiB, memory in the plan x {self.memory_factor:.3g}"
        yield f"  memory: measured {self.measured_gib:.3g} GiB; {predicted}"


def compare_run(
    config: DistillConfig,
    size: TransformerSize,
    card: Card,
    machine: Machine,
    form: str,
    iterations: Sequence[MeasuredIteration],
    peak_bytes: float,
) -> Calibration:
    """Compare what ran with the formulas; `card` stands for a machine that is not in the table of speeds."""
    kernel = planned_kernel(config.attention, card) if machine.kernel in ("torch", "math") else machine.kernel
    predict = partial(iteration_seconds, config, size, card, world=machine.ranks, form=form, kernel=kernel)
    memory = estimate_memory(config, size, world=machine.ranks, form=form)
    bytes_predicted = memory.gpu if machine.has_gpu else memory.gpu + memory.host
    return Calibration(
        device=machine.device,
        gpus=machine.ranks,
        kernel=kernel,
        total_gib=machine.total_bytes / GIB,
        predicted_seconds=sum(predict(passes=one.passes) for one in iterations),
        measured_seconds=sum(one.seconds for one in iterations),
        predicted_gib=bytes_predicted / GIB,
        measured_gib=peak_bytes / GIB,
    )
