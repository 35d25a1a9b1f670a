"""The trainer's memory modes at the true size on one GPU and on N, one after the other in one start of the ranks.

    python -m benchmarks.modes --alone /tmp/alone
    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.modes --alone /tmp/alone --modes compact,standard,hsdp

The first command leaves its mean iteration in the file; the second waits for that, and says what share of the rate of
so many single GPUs it has. hsdp: the compact form, a whole copy a GPU, what the student alone needs in host memory.
"""

import argparse
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.device import Case, case, ceiling_of
from benchmarks.loading import host_peak, load
from benchmarks.report import append
from benchmarks.train_step import MEASURES, show
from benchmarks.trainer import make_config, random_roles, trainer_of
from stage2_distill.parallel import Ranks, of_all_ranks, start

Row = tuple[str, str]
MODES = {
    "compact": {"memory": "compact"},
    "standard": {"memory": "standard"},
    "float32": {"memory": "compact", "second_moment": "float32"},
    "hsdp": {"memory": "compact", "offload": "all"},
}


def measure(mode: str, chosen: Case, given: argparse.Namespace, known: dict[str, float]) -> Iterator[Row]:
    """Figures of one mode; a model folder is opened by the first mode only."""
    world = dist.get_world_size()
    replicate = world if mode == "hsdp" else 1
    ranks = start(chosen.device.type, replicate=replicate)
    config = make_config(chosen, ranks, replicate=replicate, compile=not given.tiny, **MODES[mode])
    began = time.perf_counter()
    if given.folder is not None and mode == given.modes.split(",")[0]:
        opened, rows = load(chosen, ranks, config, given.folder)
        yield from rows
    else:
        opened = random_roles(chosen, ranks, config)
        yield "three random roles made", f"{time.perf_counter() - began:.1f} s"
    trainer = trainer_of(chosen, ranks, config, opened)
    sections = given.only.split(",")
    yield from chain.from_iterable(MEASURES[name](chosen, trainer, known) for name in sections if name != "pause")
    yield "peak host memory of the ranks", ", ".join(f"{gib:.1f}" for gib in host_peaks(ranks)) + " GiB"
    if world == 1:
        given.alone.write_text(str(known["mean"]))
    else:
        yield f"rate of {world} GPUs against {world} times one", f"{float(given.alone.read_text()) / known['mean']:.3f}"
    if "pause" in sections and mode == given.modes.split(",")[0]:
        yield from MEASURES["pause"](chosen, trainer, known)


def host_peaks(ranks: Ranks) -> list[float]:
    """GiB of every rank."""
    return [row[0] for row in of_all_ranks(torch.tensor([host_peak()], device=ranks.device)).tolist()]


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
    parser.add_argument("--alone", type=Path, required=True)
    parser.add_argument("--modes", default="compact")
    parser.add_argument("--only", default="updates")
    parser.add_argument("--layers", type=int, default=0, help="blocks of the network, to try this script")
    parser.add_argument("--folder", type=Path, help="model folder that the first mode opens")
    given = parser.parse_args()
    chosen = case(given.tiny, half=True)
    if given.layers:
        chosen = replace(chosen, network=chosen.network | {"num_layers": given.layers})
    ranks = start(chosen.device.type)
    rows = [("ranks", str(ranks.world)), ("imported and joined after", f"{age():.1f} s")]
    while ranks.world > 1 and not given.alone.exists():
        time.sleep(0.2)
    known = {"ceiling": ceiling_of(chosen)}
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
