"""The trainer's memory modes at the true size: each GPU alone, then all together, in one start of the ranks.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.modes [--modes alone,compact]

alone: every GPU trains by itself, all at once, as one process does. hsdp: the compact form, a whole copy a GPU, what
the student alone needs in host memory. A mean iteration is the mean of a critic's updates that leave the rollout at
steps 1 and 2, and a fifth of such a student's; standard, float32 and hsdp take the student's at step 1, not warmed up
for, and half a forward pass. checkpoint: the pause of one in the compact form.
accumulated: the most memory of the standard form where gradients are summed, as in the published recipe.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist

from benchmarks.device import Case, case, ceiling_of, seconds
from benchmarks.exposed import communication
from benchmarks.loading import host_peak, load
from benchmarks.report import append
from benchmarks.train_step import MEASURES, mean_iteration, show
from benchmarks.trainer import make_config, one_batch, random_condition, random_roles, report_memory, trainer_of
from common.condition import Condition
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks, start_process_group
from stage2_distill.dmd.schedule import CRITIC, STUDENT, MicroBatch
from stage2_distill.monitoring.metrics_log import UpdateResult
from stage2_distill.trainer import Trainer, update_critic, update_student

Row = tuple[str, str]
MODES = {
    "alone": {"optimizer_form": "compact"},
    "compact": {"optimizer_form": "compact"},
    "standard": {"optimizer_form": "standard"},
    "float32": {"optimizer_form": "compact", "second_moment": "float32"},
    "hsdp": {"optimizer_form": "compact", "offload": "all"},
    "checkpoint": {"optimizer_form": "compact"},
    "accumulated": {"optimizer_form": "standard"},
}
THOROUGH = ("alone", "compact")
UPDATES = {CRITIC: update_critic, STUDENT: update_student}


def measure(mode: str, chosen: Case, given: argparse.Namespace, known: dict[str, float]) -> Iterator[Row]:
    """Figures of one mode; `compact` opens the model folder, the others make their weights."""
    world = dist.get_world_size()
    replicate = world if mode == "hsdp" else 1
    ranks = start_process_group(chosen.device.type, replicate=replicate)
    if mode == "alone":
        ranks = RankContext(0, 1, ranks.device, ranks.mesh)
    config = make_config(chosen, ranks, replicate=replicate, compile=not given.tiny, **MODES[mode])
    began = time.perf_counter()
    if mode == "compact" and given.folder is not None and given.folder.exists():
        opened, rows = load(chosen, ranks, config, given.folder)
        yield from rows
    else:
        opened = random_roles(chosen, ranks, config)
        yield "three random roles made", f"{time.perf_counter() - began:.1f} s"
    trainer = trainer_of(chosen, ranks, config, opened)
    if mode == "accumulated":
        update_critic(trainer, leaving(trainer, CRITIC, 0), two_batches(chosen, ranks))
        yield "peak memory in the second of two micro-batches", report_memory(chosen)
        return
    if mode == "checkpoint":
        yield from MEASURES["pause"](chosen, trainer, known)
    else:
        yield from iteration(chosen, trainer, known, mode)
    yield "peak host memory of the ranks", ", ".join(f"{gib:.1f}" for gib in host_peaks(ranks)) + " GiB"
    if mode not in ("alone", "checkpoint"):
        yield from communication(update(chosen, trainer, CRITIC, 0), chosen, f"critic update of {ranks.world} ranks")


def leaving(trainer: Trainer, role: str, step: int) -> int:
    """The first iteration in which a role's update leaves the rollout at a step."""
    return next(n for n in range(10_000) if trainer.schedule.draw_exit_index(n, role) == step)


def two_batches(chosen: Case, ranks: RankContext) -> Iterator[tuple[MicroBatch, Condition]]:
    """Both micro-batches of a critic's update."""
    for last in (False, True):
        yield MicroBatch(0, CRITIC, (ranks.rank,), (ranks.rank,), 0.5, last), random_condition(chosen)


def update(chosen: Case, trainer: Trainer, role: str, leaves: int) -> Callable[[], UpdateResult]:
    """An update of a role that leaves the rollout at a step."""
    number = leaving(trainer, role, leaves)
    return lambda: UPDATES[role](trainer, number, one_batch(chosen, trainer.ranks, role, number))


def iteration(chosen: Case, trainer: Trainer, known: dict[str, float], mode: str) -> Iterator[Row]:
    """Seconds of both roles' updates and of a mean iteration, and the rate against GPUs that train alone."""
    found: dict[str, list[float]] = {}
    for role in (CRITIC, STUDENT):
        if role == CRITIC or mode in THOROUGH:
            warm = seconds(update(chosen, trainer, role, 0), chosen, warm=0, repeat=1)
            yield f"first {role} update, exit 0", f"{warm:.1f} s"
        steps = (1, 2) if role == CRITIC or mode in THOROUGH else (1,)
        found[role] = [seconds(update(chosen, trainer, role, step), chosen, warm=0, repeat=1) for step in steps]
        yield f"{role} updates, exits {steps}", f"{', '.join(f'{s:.3f}' for s in found[role])} s"
    forward = found[CRITIC][1] - found[CRITIC][0]
    student = mean(found[STUDENT]) if mode in THOROUGH else found[STUDENT][0] + forward / 2
    spent = mean(found[CRITIC]) + student / trainer.schedule.student_update_interval
    yield from mean_iteration(chosen, trainer, known, spent)
    known[mode] = spent
    if "alone" in known and mode != "alone":
        yield "rate of a GPU against one that trains alone", f"{known['alone'] / spent:.3f}"


def host_peaks(ranks: RankContext) -> list[float]:
    """GiB of every rank."""
    return [row[0] for row in gather_from_ranks(torch.tensor([host_peak()], device=ranks.device)).tolist()]


def age() -> float:
    """Seconds since this process began (Linux)."""
    began = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def forget(chosen: Case) -> None:
    """Free what a mode held on the device."""
    gc.collect()
    if chosen.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--modes", default="alone,compact,standard,hsdp,checkpoint,accumulated")
    parser.add_argument("--layers", type=int, default=0, help="blocks of the network, to try this script")
    parser.add_argument("--folder", type=Path, help="model folder that the mode compact opens, if it is there")
    given = parser.parse_args()
    chosen = case(given.tiny, half=True)
    if given.layers:
        chosen = replace(chosen, network=chosen.network | {"num_layers": given.layers})
    ranks = start_process_group(chosen.device.type)
    known = {"ceiling": ceiling_of(chosen)}
    rows = [("ranks", str(ranks.world)), ("first product after", f"{age():.1f} s")]
    rows.append(("matrix product", f"{known['ceiling']:.0f} TFLOP/s"))
    show(ranks.rank, rows)
    for mode in given.modes.split(","):
        for name, value in measure(mode, chosen, given, known):
            rows.append((f"{mode}, {name}", value))
            show(ranks.rank, rows[-1:])
        forget(chosen)
    if ranks.rank == 0 and not chosen.tiny:
        append("modes", rows, model="random weights")


if __name__ == "__main__":
    main()
