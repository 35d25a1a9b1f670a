"""What an iteration costs: seconds, memory, utilisation; one process or torchrun's ranks.

    python -m benchmarks.train_step [--tiny] [--memory compact] [--keep attention] [--only iteration,passes]
    torchrun --nproc-per-node 2 -m benchmarks.train_step --memory standard

A mean iteration is the mean critic update and a fifth of the mean student update, each exit of the
ladder run once; with a reused rollout, the critic's updates of one whole cycle.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Case, case, inputs, seconds, synchronize
from benchmarks.loading import load
from benchmarks.network import backward_of, forward_of
from benchmarks.report import append
from benchmarks.trainer import finite, make_config, one_batch, random_roles, report_memory, trainer_of
from stage2_distill.parallel import start
from stage2_distill.resume import state
from stage2_distill.reuse import Reuse
from stage2_distill.saver import host_copies
from stage2_distill.schedule import CRITIC, STUDENT, exit_index
from stage2_distill.train import Trainer, Update, ema_decay, masters, update_critic, update_student

Row = tuple[str, str]
FORWARD = 520.7  # TFLOP at the true size
SECTIONS = "iteration,passes,reuse,waits,pause"
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


def updates(chosen: Case, trainer: Trainer, role: str, known: dict[str, float]) -> Iterator[Row]:
    """Seconds of a role's updates; their mean becomes known."""
    losses: list[float] = []

    def update(turn: int) -> Callable[[], None]:
        return lambda: losses.append(run_update(chosen, trainer, role, turn).loss)

    rounds = turns(trainer, role)
    yield f"first {role} update", f"{seconds(update(rounds[1]), chosen, warm=0, repeat=1):.1f} s"
    each = [seconds(update(turn), chosen, warm=0, repeat=1) for turn in rounds]
    known[role] = statistics.mean(each)
    yield f"{role} updates", f"{', '.join(f'{s:.2f}' for s in each)}, mean {known[role]:.2f} s"
    yield f"{role} losses finite", str(finite(losses))


def mean_iteration(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """A mean iteration, its utilisation and memory."""
    config = trainer.config
    mean = known[CRITIC] + known[STUDENT] / config.student_every
    spared = (2.5 - len(config.ladder) / config.student_every) * config.rollout_reuse
    useful = (USEFUL[CRITIC] - spared + USEFUL[STUDENT] / config.student_every) * FORWARD / mean
    yield "mean iteration", f"{mean:.2f} s, {trainer.ranks.world / mean:.3f} samples/s"
    yield "useful arithmetic", f"{useful:.0f} TFLOP/s a GPU, {useful / known['ceiling']:.1%} of the measured ceiling"
    yield "peak memory", report_memory(chosen)


def iteration(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """A mean iteration of the recipe."""
    for role in (CRITIC, STUDENT):
        yield from updates(chosen, trainer, role, known)
    yield from mean_iteration(chosen, trainer, known)


def reuse(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """The same where one rollout serves the critic's updates between two of the student."""
    config = replace(trainer.config, rollout_reuse=True)
    reusing = replace(trainer, config=config, reuse=Reuse(config, trainer.ranks.world))
    figures = dict(known)
    rows = [
        updates(chosen, reusing, role, figures) for role in (CRITIC, STUDENT) if role == CRITIC or role not in known
    ]
    for name, value in chain(*rows, mean_iteration(chosen, reusing, figures)):
        yield f"rollout reuse, {name}", value


def waits(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """How often the host waits for the device in one update of each role, by the profiler."""
    for role in (CRITIC, STUDENT):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run_update(chosen, trainer, role, turns(trainer, role)[0])
        counts = {event.key: event.count for event in found.key_averages() if event.key in WAITS}
        yield f"waits in a {role} update", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())) or "none"
        synchronize(chosen)


def passes(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """One forward, and one forward and backward pass of the student."""
    given = inputs(chosen)
    for name, run in (("forward", forward_of), ("forward + backward", backward_of)):
        yield name, f"{seconds(run(trainer.roles.student, given), chosen, warm=1, repeat=2):.4f} s"
    trainer.student_optimizer.zero_grad(set_to_none=True)


def pause(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """How long training stands still for a checkpoint: the copy of its state to host memory."""
    tensors = state(trainer)
    size = sum(value.numel() * value.element_size() for value in tensors.values()) / 2**30
    spent = seconds(lambda: host_copies(tensors, trainer.ranks), chosen, warm=0, repeat=1)
    yield "pause of a checkpoint", f"{spent:.2f} s, {size:.1f} GiB"


def ceiling_of(chosen: Case) -> float:
    """TFLOP/s of a large matrix product."""
    size = 64 if chosen.tiny else 8192
    a, b = (torch.randn(size, size, device=chosen.device, dtype=chosen.dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, chosen, warm=3, repeat=20) / 1e12


def show(rank: int, rows: list[Row]) -> None:
    """Print rows as soon as they are known."""
    for row in rows if rank == 0 else ():
        print(*row, sep=": ", flush=True)


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", default="compact")
    parser.add_argument("--keep", default="attention")
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = all weights")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--folder", type=Path, help="model folder to open; without it weights are made on the device")
    parser.add_argument("--only", default=SECTIONS)
    given = parser.parse_args()
    chosen = case(given.tiny, half=given.memory == "compact" or given.lora > 0)
    ranks = start(chosen.device.type, replicate=given.replicate)
    knobs = {"memory": given.memory, "keep_activations": given.keep, "replicate": given.replicate}
    knobs["compile"] = not (given.tiny or given.eager)
    config = make_config(chosen, ranks, lora_rank=given.lora, **knobs)
    known = {"ceiling": ceiling_of(chosen)}
    rows: list[Row] = [
        ("command", " ".join(sys.argv[1:])),
        ("ranks", str(ranks.world)),
        ("matrix product", f"{known['ceiling']:.0f} TFLOP/s"),
    ]
    if given.folder is None:
        opened = random_roles(chosen, ranks, config)
    else:
        opened, more = load(chosen, ranks, config, given.folder)
        rows += more
    show(ranks.rank, rows)
    trainer = trainer_of(chosen, ranks, config, opened)
    sections = {"iteration": iteration, "reuse": reuse, "waits": waits, "passes": passes, "pause": pause}
    for name in given.only.split(","):
        for row in sections[name](chosen, trainer, known):
            show(ranks.rank, [row])
            rows.append(row)
    if ranks.rank == 0 and not given.tiny:
        append("train_step", rows, model="random weights")


if __name__ == "__main__":
    main()
