"""What an iteration costs: seconds, memory, utilisation; one process or torchrun's ranks.

    python -m benchmarks.train_step [--tiny] [--memory compact] [--keep attention] [--only iteration,passes]
    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.train_step --memory standard --only updates,exposed

A mean iteration is the time of --count whole iterations by their number, from where the exits have their mean.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Case, case, ceiling_of, inputs, seconds, synchronize
from benchmarks.exposed import communication
from benchmarks.loading import host_peak, load, write_apart
from benchmarks.network import backward_of, forward_of
from benchmarks.report import append
from benchmarks.trainer import (
    balanced,
    finite,
    make_config,
    one_batch,
    random_condition,
    random_roles,
    report_memory,
    trainer_of,
)  # fmt: skip
from stage2_distill.checkpointing.staging import HostBuffers, StagedState, allocate_host_buffers, build_cpu_mesh
from stage2_distill.distributed.process_group import start_process_group
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.monitoring.metrics_log import StepResult, UpdateResult
from stage2_distill.resume import training_state
from stage2_distill.trainer import Trainer, train_step, update_critic, update_student

Row = tuple[str, str]
FORWARD = 520.7  # TFLOP at the true size
SECTIONS = "iteration,reuse,passes,waits,pause"
USEFUL = {CRITIC: 2.5 + 3, STUDENT: 1.5 + 3 + 3}  # forwards: rollout, a gradient's three, scores
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def turn(chosen: Case, trainer: Trainer, iteration: int) -> StepResult:
    """One iteration of the trainer on random data."""
    ranks = trainer.ranks
    todo = trainer.schedule.micro_batches(start=iteration, rank=ranks.rank)
    return train_step(trainer, iteration, ((part, random_condition(chosen)) for part in todo))


def iteration(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """Whole iterations one after the other, all that a run does but data and files; the average is updated aside."""
    trainer = replace(
        trainer, schedule=replace(trainer.schedule, ema_start=0)
    )  # pinned memory for it takes 20 s to come
    count = int(known["count"])
    start = balanced(trainer.schedule, count)
    began = perf_counter()
    turn(chosen, trainer, start - trainer.schedule.student_update_interval)
    synchronize(chosen)
    trainer.timer.read_seconds()
    yield "first iteration of both roles, compilation included", f"{perf_counter() - began:.1f} s"
    yield "peak host memory of rank 0", f"{host_peak():.1f} GiB, the average included"
    began, steps, marks = perf_counter(), [], []
    for number in range(start, start + count):
        steps.append(turn(chosen, trainer, number))
        marks.append(perf_counter() - began)
    synchronize(chosen)
    spent = (perf_counter() - began) / count
    each = [b - a for a, b in zip([0.0, *marks], marks, strict=False)]
    yield f"iterations {start} to {start + count - 1}, seconds (exits)", ", ".join(map(told, steps, each))
    yield from mean_iteration(chosen, trainer, known, spent)
    read = [step.seconds for step in steps] + [trainer.timer.read_seconds()]
    phases = {name: sum(found.get(name, 0) for found in read) / count for name in read[0]}
    yield "phases of a mean iteration", ", ".join(f"{name} {value:.3f} s" for name, value in phases.items())
    losses = [update.loss for step in steps for update in (step.student, step.critic) if update is not None]
    yield "losses finite", f"{finite(losses)}, {len(losses)} updates"


def told(step: StepResult, spent: float) -> str:
    """An iteration in few words."""
    student = "" if step.student is None else f"student {step.student.exit_index}, "
    return f"{spent:.2f} ({student}critic {step.critic.exit_index})"


def mean_iteration(chosen: Case, trainer: Trainer, known: dict[str, float], spent: float) -> Iterator[Row]:
    """A mean iteration, its utilisation and memory."""
    schedule, reuses = trainer.schedule, isinstance(trainer.accumulator.critic_rollouts, RolloutReuse)
    spared = (2.5 - len(schedule.timesteps) / schedule.student_update_interval) * reuses
    useful = (USEFUL[CRITIC] - spared + USEFUL[STUDENT] / schedule.student_update_interval) * FORWARD / spent
    yield "mean iteration", f"{spent:.3f} s, {trainer.ranks.world / spent:.3f} samples/s"
    yield "useful arithmetic", f"{useful:.0f} TFLOP/s a GPU, {useful / known['ceiling']:.1%} of the measured ceiling"
    yield "peak memory, of the rank with most", report_memory(chosen)


def reuse(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """The same where one rollout serves the critic's updates between two of the student."""
    reused = RolloutReuse(trainer.accumulator.student_rollouts, trainer.schedule)
    reusing = replace(trainer, accumulator=replace(trainer.accumulator, critic_rollouts=reused))
    for name, value in iteration(chosen, reusing, known):
        yield f"rollout reuse, {name}", value


def updates(chosen: Case, trainer: Trainer, known: dict[str, float]) -> Iterator[Row]:
    """A mean iteration in short: of each role one update that leaves at step 1 and one at step 2."""
    found = {}
    for role, update in ((CRITIC, update_critic), (STUDENT, update_student)):

        def run(exit_at: int, role: str = role, update: Callable[..., UpdateResult] = update) -> float:
            number = next(n for n in range(10_000) if trainer.schedule.draw_exit_index(n, role) == exit_at)
            data = one_batch(chosen, trainer.ranks, role, number)
            return seconds(lambda: update(trainer, number, data), chosen, warm=0, repeat=1)

        if not chosen.tiny or role == CRITIC:
            yield f"first {role} update", f"{run(0):.1f} s"
        each = []
        for exit_at in (1, 2):  # their mean is the mean of all four
            each.append(run(exit_at))
            yield f"{role} update, exit {exit_at}", f"{each[-1]:.2f} s"
        found[role] = mean(each)
        yield f"peak memory after the {role}'s", report_memory(chosen)
    spent = found[CRITIC] + found[STUDENT] / trainer.schedule.student_update_interval
    yield from mean_iteration(chosen, trainer, known, spent)


def exposed(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """How much of the two updates of an iteration is communication that nothing hides."""
    for role, update in ((CRITIC, update_critic), (STUDENT, update_student)):
        number = next(n for n in range(10_000) if trainer.schedule.draw_exit_index(n, role) == 0)
        run = partial(update, trainer, number, one_batch(chosen, trainer.ranks, role, number))
        yield from communication(run, chosen, f"{role} update")


def waits(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """How often the host waits for the device in one iteration of both roles, by the profiler."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (chosen.device.type == "cuda")
    with profile(activities=kinds) as found:
        turn(chosen, trainer, trainer.schedule.student_update_interval)
    counts = {event.key: event.count for event in found.key_averages() if event.key in WAITS}
    told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield "host waits in an iteration of two updates", told or "none"


def passes(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """One forward, and one forward and backward pass of the student."""
    given = inputs(chosen)
    for name, run in (("forward", forward_of), ("forward + backward", backward_of)):
        yield name, f"{seconds(run(trainer.roles.student.net, given), chosen, warm=1, repeat=2):.4f} s"
    trainer.roles.student.optimizer.zero_grad(set_to_none=True)


def pause(chosen: Case, trainer: Trainer, _known: dict[str, float]) -> Iterator[Row]:
    """How much longer a checkpoint makes the shortest iteration, and how long the copy to host memory takes."""
    schedule = trainer.schedule
    short = next(
        n for n in range(10_000) if not schedule.is_student_turn(n) and schedule.draw_exit_index(n, CRITIC) == 0
    )
    began, rooms = perf_counter(), HostBuffers()
    allocate_host_buffers(training_state(trainer.roles), rooms)
    yield "room for it in host memory, once in a run, beside training", f"{perf_counter() - began:.1f} s"
    alone = seconds(lambda: turn(chosen, trainer, short), chosen, warm=1, repeat=1)
    began = perf_counter()
    live = training_state(trainer.roles)
    snapshot = StagedState(live, build_cpu_mesh(trainer.ranks), rooms, first=CRITIC)
    issued = perf_counter() - began
    hook = trainer.roles.critic.optimizer.register_step_pre_hook(lambda *_: snapshot.wait_for_role(CRITIC))
    turn(chosen, trainer, short)
    synchronize(chosen)
    beside = perf_counter() - began
    hook.remove()
    size = sum(value.nbytes for value in live.values()) / 2**30
    yield "pause of a checkpoint", f"{beside - alone:.2f} s beside an iteration of {alone:.2f} s, {size:.1f} GiB"
    began = perf_counter()
    StagedState(live, build_cpu_mesh(trainer.ranks), rooms, first=CRITIC).wait_for_all()
    yield "the copy by itself", f"{perf_counter() - began:.2f} s, begun in {issued:.2f} s"


MEASURES = {
    "iteration": iteration, "reuse": reuse, "passes": passes, "waits": waits, "pause": pause, "updates": updates,
    "exposed": exposed,
}  # fmt: skip


def show(rank: int, rows: list[Row]) -> None:
    """Print rows as soon as they are known."""
    for row in rows if rank == 0 else ():
        print(*row, sep=": ", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", default="compact")
    parser.add_argument("--keep", default="selective")
    parser.add_argument("--offload", default="average")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 = all weights")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--folder", type=Path, help="model folder to open; without it weights are made on the device")
    parser.add_argument("--only", default=SECTIONS, help=f"of {SECTIONS},updates,exposed")
    parser.add_argument("--count", type=int, default=20, help="iterations timed")
    return parser.parse_args()


def main() -> None:
    """Measure, print and append to the results."""
    given = arguments()
    chosen = case(given.tiny, half=given.memory == "compact" or given.lora > 0)
    ranks = start_process_group(chosen.device.type, replicate=given.replicate)
    knobs = {"optimizer_form": given.memory, "activation_checkpointing": given.keep, "replicate": given.replicate}
    knobs |= {"compile": not (given.tiny or given.eager), "offload": given.offload, "attention": given.attention}
    config = make_config(chosen, ranks, lora_rank=given.lora, **knobs)
    known = {"ceiling": ceiling_of(chosen), "count": given.count}
    rows: list[Row] = [
        ("command", " ".join(sys.argv[1:])),
        ("ranks", str(ranks.world)),
        ("matrix product", f"{known['ceiling']:.0f} TFLOP/s"),
    ]
    if given.folder is None:
        opened = random_roles(chosen, ranks, config)
    else:
        if ranks.rank == 0:
            write_apart(given.folder, given.tiny)
        dist.barrier()
        opened, more = load(chosen, ranks, config, given.folder)
        rows += more
    show(ranks.rank, rows)
    trainer = trainer_of(chosen, ranks, config, opened)
    for name in given.only.split(","):
        for row in MEASURES[name](chosen, trainer, known):
            show(ranks.rank, [row])
            rows.append(row)
    if ranks.rank == 0 and not given.tiny:
        append("train_step", rows, model="random weights")


if __name__ == "__main__":
    main()
