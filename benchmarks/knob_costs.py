"""What each knob of the recipe costs at the true size: seconds of an update and of an iteration, and peak memory.

    python -m benchmarks.knob_costs [--lora 32] [--eager] [--tiny]

Weights and data are random. The weights are made twice: without and with an averaged critic, which is a network more.
A knob changes the student's update, which is timed at the exits 1 and 2, whose mean is that of all four; with the
anchor, which acts at exit 0, at all four. A mean iteration of the published recipe has one update of the critic and a
fifth of one of the student. The base is measured twice, the first time to compile it.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from benchmarks.device import Case, make_case
from benchmarks.runner import RESULTS, append_results, parse_arguments, peak_gib, time_call
from benchmarks.trainer import make_config, make_trainer, random_roles, role_update
from stage2_distill.config import COMPACT, STANDARD, DistillConfig
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.trainer import Roles

COLUMNS = ("knob", "student's update, s", "critic's update, s", "mean iteration, s", "of the base", "peak, GiB")
ALL_EXITS, MIDDLE_EXITS = (0, 1, 2, 3), (1, 2)
FOREVER = 1_000_000  # iterations
KNOBS: dict[str, dict[str, object]] = {
    "base": {},
    "ida_share 0.03": {"ida_share": 0.03},
    "exit_weights 0.25, 1, 1, 1": {"exit_weights": (0.25, 1.0, 1.0, 1.0)},
    "temporal_variance_weight 0.05": {"temporal_variance_weight": 0.05},
    "decoupled_guidance": {"decoupled_guidance": True},
    "guidance_rescale 0.7": {"guidance_rescale": 0.7},
    "score_time_low_share 0.3": {"score_time_low_share": 0.3},
    "anchor_weight 0.05": {"anchor_weight": 0.05},
    "regression_weight 4, 10 steps": {"regression_weight": 4.0},
    "regression_weight 4, 20 steps": {"regression_weight": 4.0, "regression_steps": 20},
    "teacher_warmup, while it lasts": {"teacher_warmup": FOREVER},
}
AVERAGE = "critic_ema_decay 0.99"


@dataclass(frozen=True)
class KnobCost:
    """Seconds of an update of each role, and peak memory of both."""

    student: float
    critic: float  # 0 = not updated
    peak: float  # GiB

    def iteration(self, interval: int) -> float:
        """Seconds of a mean iteration."""
        return self.critic + self.student / interval if self.critic else self.student


def measure_knob(case: Case, ranks: RankContext, roles: Roles, config: DistillConfig, critic: float | None) -> KnobCost:
    """Time the student's update of a configuration, and the critic's unless its time is known."""
    trainer = make_trainer(case, ranks, config, roles)
    peak_gib()  # forgets what came before
    exits = ALL_EXITS if config.anchor_weight else MIDDLE_EXITS
    student = fmean(time_call(role_update(case, trainer, STUDENT, one), warm=0, repeats=1) for one in exits)
    if critic is None:
        critic = fmean(time_call(role_update(case, trainer, CRITIC, one), warm=0, repeats=1) for one in MIDDLE_EXITS)
    return KnobCost(student, critic, peak_gib())


def measure(options: argparse.Namespace) -> Iterator[tuple[str, KnobCost]]:
    """Measure all knobs one after the other, the base first."""
    case = make_case(options.tiny, half=True)
    ranks = start_process_group(case.device.type)
    form = STANDARD if options.lora else COMPACT
    base = make_config(
        case, ranks, optimizer_form=form, lora_rank=options.lora, compile=not (options.tiny or options.eager)
    )
    roles, critic = random_roles(case, ranks, base), None
    measure_knob(case, ranks, roles, base, None)  # compiles
    for name, changes in KNOBS.items():
        cost = measure_knob(case, ranks, roles, replace(base, **changes), critic)
        critic = cost.critic
        yield name, replace(cost, critic=0.0) if "teacher_warmup" in changes else cost
    del roles
    gc.collect()
    torch.cuda.empty_cache()  # no effect without a GPU
    averaged = replace(base, critic_ema_decay=0.99)
    roles = random_roles(case, ranks, averaged)
    measure_knob(case, ranks, roles, averaged, None)
    yield AVERAGE, measure_knob(case, ranks, roles, averaged, None)


def cost_row(name: str, cost: KnobCost, base: KnobCost, interval: int) -> Sequence[str]:
    """The row of a knob."""
    seconds = [f"{value:.2f}" for value in (cost.student, cost.critic, cost.iteration(interval))]
    ratio = cost.iteration(interval) / base.iteration(interval)
    return (name, *seconds, f"{ratio:.3f}", f"{cost.peak:.1f} ({cost.peak - base.peak:+.1f})")


def main() -> None:
    """Measure, print each row as it comes, and append the table to the results."""
    options = parse_arguments(__doc__, lora=0, eager=False, tiny=False, out=RESULTS)
    interval, base, rows = DistillConfig.student_update_interval, None, []
    for name, cost in measure(options):
        base = base or cost
        rows.append(cost_row(name, cost, base, interval))
        print("  ".join(rows[-1]), flush=True)
    if not options.tiny:
        append_results("knob_costs", rows, model="random weights", columns=COLUMNS, folder=options.out)


if __name__ == "__main__":
    main()
