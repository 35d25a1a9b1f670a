"""What an iteration costs: seconds, memory, utilisation; one process or torchrun's ranks.

    python -m benchmarks.train_step [--tiny] [--memory compact] [--keep attention] [--only iteration,reuse,waits]
    torchrun --nproc-per-node 2 -m benchmarks.train_step --memory standard

A mean iteration is the mean critic update and a fifth of the mean student update, each exit of the
ladder run once; with a reused rollout, the critic's updates of one whole cycle.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Case, case, seconds, synchronize
from benchmarks.report import append
from benchmarks.trainer import finite, make_config, one_batch, random_trainer, report_memory
from stage2_distill.parallel import start
from stage2_distill.reuse import Reuse
from stage2_distill.schedule import CRITIC, STUDENT, exit_index
from stage2_distill.train import Trainer, Update, ema_decay, masters, update_critic, update_student

Row = tuple[str, str]
FORWARD = 520.7  # TFLOP at the true size
USEFUL = {CRITIC: 2.5 + 3, STUDENT: 1.5 + 3 + 3}  # forwards: rollout, a gradient's three, scores
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def turns(trainer: Trainer, role: str) -> list[int]:
    """Iterations whose updates together show the mean: one of each exit; of a reused rollout, one whole cycle."""
    config = trainer.config
    if role == CRITIC and config.rollout_reuse:
        return list(range(config.student_every))
    exits = range(len(config.ladder))
    return [next(n for n in range(10_000) if exit_index(n, role, config) == exit_at) for exit_at in exits]


def run_update(chosen: Case, trainer: Trainer, role: str, iteration: int) -> Update:
    """One update, the average of the student included."""
    data = one_batch(chosen, trainer.ranks, role, iteration)
    if role == CRITIC:
        return update_critic(trainer, iteration, data)
    update = update_student(trainer, iteration, data)
    averaged = masters(trainer.roles.student, trainer.student_optimizer)
    trainer.ema.update(averaged, ema_decay(iteration, trainer.config), trainer.ranks.device)
    return update


def iteration(chosen: Case, trainer: Trainer, ceiling: float) -> Iterator[Row]:
    """Seconds of both updates by exit, of a mean iteration, memory and utilisation."""
    losses: list[float] = []

    def update(role: str, turn: int) -> Callable[[], None]:
        return lambda: losses.append(run_update(chosen, trainer, role, turn).loss)

    for role in (CRITIC, STUDENT):
        yield (
            f"first {role} update",
            f"{seconds(update(role, turns(trainer, role)[1]), chosen, warm=0, repeat=1):.1f} s",
        )
    means = {}
    for role in (CRITIC, STUDENT):
        each = [seconds(update(role, turn), chosen, warm=0, repeat=1) for turn in turns(trainer, role)]
        means[role] = statistics.mean(each)
        yield f"{role} updates", ", ".join(f"{s:.2f}" for s in each) + f", mean {means[role]:.2f} s"
    every = trainer.config.student_every
    mean = means[CRITIC] + means[STUDENT] / every
    spared = (2.5 - len(turns(trainer, STUDENT)) / every) * trainer.config.rollout_reuse
    useful = (USEFUL[CRITIC] - spared + USEFUL[STUDENT] / every) * FORWARD / mean
    yield "mean iteration", f"{mean:.2f} s, {trainer.ranks.world / mean:.3f} samples/s"
    yield "useful arithmetic", f"{useful:.0f} TFLOP/s a GPU, {useful / ceiling:.1%} of {ceiling:.0f} measured"
    yield "peak memory", report_memory(chosen)
    yield "losses finite", str(finite(losses))


def reuse(chosen: Case, trainer: Trainer, ceiling: float) -> Iterator[Row]:
    """The same where one rollout serves the critic's updates between two of the student."""
    config = replace(trainer.config, rollout_reuse=True)
    reusing = replace(trainer, config=config, reuse=Reuse(config, trainer.ranks.world))
    for name, value in iteration(chosen, reusing, ceiling):
        yield f"rollout reuse, {name}", value


def waits(chosen: Case, trainer: Trainer, _ceiling: float) -> Iterator[Row]:
    """How often the host waits for the device in one update of each role, by the profiler."""
    for role in (CRITIC, STUDENT):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run_update(chosen, trainer, role, turns(trainer, role)[0])
        counts = {event.key: event.count for event in found.key_averages() if event.key in WAITS}
        yield f"waits in a {role} update", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())) or "none"
        synchronize(chosen)


def ceiling_of(chosen: Case) -> float:
    """TFLOP/s of a large matrix product."""
    size = 64 if chosen.tiny else 8192
    a, b = (torch.randn(size, size, device=chosen.device, dtype=chosen.dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, chosen, warm=3, repeat=20) / 1e12


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", default="compact")
    parser.add_argument("--keep", default="attention")
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = all weights")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--only", default="iteration,reuse,waits")
    given = parser.parse_args()
    chosen = case(given.tiny, half=given.memory == "compact" or given.lora > 0)
    ranks = start(chosen.device.type, replicate=given.replicate)
    knobs = {"memory": given.memory, "keep_activations": given.keep, "replicate": given.replicate}
    knobs["compile"] = not (given.tiny or given.eager)
    config = make_config(chosen, ranks, lora_rank=given.lora, **knobs)
    ceiling = ceiling_of(chosen)
    trainer = random_trainer(chosen, ranks, config)
    rows: list[Row] = [("command", " ".join(sys.argv[1:])), ("ranks", str(ranks.world))]
    sections = {"iteration": iteration, "reuse": reuse, "waits": waits}
    for name in given.only.split(","):
        for row in sections[name](chosen, trainer, ceiling):
            if ranks.rank == 0:
                print(*row, sep=": ", flush=True)
            rows.append(row)
    if ranks.rank == 0 and not given.tiny:
        append("train_step", rows, model="random weights")


if __name__ == "__main__":
    main()
