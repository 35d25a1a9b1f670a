"""The trainer's memory modes at the true size: each GPU alone, then all together, in one start of the ranks.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.modes [--modes alone,compact] [--folder MODEL]

alone: every GPU trains by itself, all at the same time. hsdp: the compact form with a complete copy on each GPU, and in
host memory what only the student needs. A mean iteration is the mean of critic updates that leave the rollout at steps
1 and 2, plus a fifth of the same mean of student updates; standard, float32 and hsdp measure the student update at step
1 only, without warm-up, and add half a forward pass. checkpoint: the pause for one in the compact form.
accumulated: the peak memory of the standard form if gradients are accumulated, as in the published recipe.

--folder: model folder that the mode compact opens, if it exists. --layers: blocks of the network, to try the script.
"""

import argparse
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist

from benchmarks.device import Case, communication_rows, make_case, matmul_tflops
from benchmarks.loading import load_roles
from benchmarks.runner import Row, parse_arguments, run_benchmark, time_call
from benchmarks.train_step import mean_iteration_rows, measure_pause
from benchmarks.trainer import (
    gpu_peaks,
    host_peak_gib,
    iteration_with_exit,
    make_config,
    make_trainer,
    random_batches,
    random_roles,
    role_update,
)  # fmt: skip
from stage2_distill.distributed.process_group import RankContext, gather_from_ranks, start_process_group
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.trainer import Trainer, update_critic

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


def measure_mode(mode: str, case: Case, options: argparse.Namespace, facts: dict[str, float]) -> Iterator[Row]:
    """Measure one mode; `compact` opens the model folder, the others make their weights."""
    replicate = dist.get_world_size() if mode == "hsdp" else 1
    ranks = start_process_group(case.device.type, replicate=replicate)
    if mode == "alone":
        ranks = RankContext(0, 1, ranks.device, ranks.mesh)
    config = make_config(case, ranks, replicate=replicate, compile=not options.tiny, **MODES[mode])
    began = time.perf_counter()
    if mode == "compact" and options.folder is not None and options.folder.exists():
        built, rows = load_roles(ranks, config, options.folder)
        yield from rows
    else:
        built = random_roles(case, ranks, config)
        yield "three random roles made", f"{time.perf_counter() - began:.1f} s"
    trainer = make_trainer(case, ranks, config, built)
    if mode == "accumulated":
        number = iteration_with_exit(trainer.schedule, CRITIC, 0)
        update_critic(trainer, number, random_batches(case, ranks, CRITIC, number, count=2))
        yield "peak memory in the second of two micro-batches", gpu_peaks(case)
        return
    if mode == "checkpoint":
        yield from measure_pause(case, trainer, facts)
    else:
        yield from measure_iteration(case, trainer, facts, mode)
    peaks = gather_from_ranks(torch.tensor([host_peak_gib()], device=ranks.device)).flatten().tolist()
    yield "peak host memory of the ranks", ", ".join(f"{gib:.1f}" for gib in peaks) + " GiB"
    if mode not in ("alone", "checkpoint"):
        update = role_update(case, trainer, CRITIC, 0)
        yield from communication_rows(update, case, f"critic update of {ranks.world} ranks")


def measure_iteration(case: Case, trainer: Trainer, facts: dict[str, float], mode: str) -> Iterator[Row]:
    """Time both roles' updates, and compare a mean iteration with that of GPUs that train alone."""
    seconds: dict[str, list[float]] = {}
    for role in (CRITIC, STUDENT):
        exits = (1, 2) if role == CRITIC or mode in THOROUGH else (1,)
        if len(exits) == 2:
            first = time_call(role_update(case, trainer, role, 0), warm=0, repeats=1)
            yield f"first {role} update, exit 0", f"{first:.1f} s"
        seconds[role] = [time_call(role_update(case, trainer, role, step), warm=0, repeats=1) for step in exits]
        yield f"{role} updates, exits {exits}", f"{', '.join(f'{s:.3f}' for s in seconds[role])} s"
    forward = seconds[CRITIC][1] - seconds[CRITIC][0]
    student = mean(seconds[STUDENT]) if mode in THOROUGH else seconds[STUDENT][0] + forward / 2
    facts[mode] = mean(seconds[CRITIC]) + student / trainer.schedule.student_update_interval
    yield from mean_iteration_rows(case, trainer, facts, facts[mode])
    if "alone" in facts and mode != "alone":
        yield "rate of a GPU against one that trains alone", f"{facts['alone'] / facts[mode]:.3f}"


def process_age() -> float:
    """Return the seconds since this process began (Linux)."""
    began = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def free_memory(case: Case) -> None:
    """Free what a mode held on the device."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(options: argparse.Namespace, case: Case, ranks: RankContext) -> Iterator[Row]:
    """Measure the modes of the command line one after another."""
    facts = {"ceiling": matmul_tflops(case)}
    yield "ranks", str(ranks.world)
    yield "first product after", f"{process_age():.1f} s"
    yield "matrix product", f"{facts['ceiling']:.0f} TFLOP/s"
    for mode in options.modes.split(","):
        for name, value in measure_mode(mode, case, options, facts):
            yield f"{mode}, {name}", value
        free_memory(case)


def main() -> None:
    """Measure, print and append to the results."""
    modes = "alone,compact,standard,hsdp,checkpoint,accumulated"
    options = parse_arguments(__doc__, tiny=False, modes=modes, layers=0, folder=Path)
    case = make_case(options.tiny, half=True)
    if options.layers:
        case = replace(case, network=case.network | {"num_layers": options.layers})
    ranks = start_process_group(case.device.type)
    rows = measure(options, case, ranks)
    run_benchmark("modes", rows, keep=not case.tiny, rank=ranks.rank, model="random weights")


if __name__ == "__main__":
    main()
