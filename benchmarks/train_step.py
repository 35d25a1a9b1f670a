"""What an iteration costs: seconds, memory, utilization; in one process or in torchrun's ranks.

    python -m benchmarks.train_step [--tiny] [--memory compact] [--keep selective] [--only iteration,passes]
    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.train_step --memory standard --only updates,exposed

A mean iteration is the time of --count whole iterations divided by their number, from an iteration from which the exits
have their mean. --folder opens a model folder; without it the weights are made on the device. --lora is the rank of
adapters (0: all weights). --set changes other options of distill: --set "critic_ema_decay=0.99 anchor_weight=0.05".
--only takes iteration, reuse, passes, waits, pause, updates and exposed.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import Case, communication_rows, inputs, make_case, matmul_tflops
from benchmarks.loading import load_roles, write_in_child
from benchmarks.network import backward_of, forward_of
from benchmarks.runner import Row, parse_arguments, run_benchmark, sync, time_call
from benchmarks.trainer import (
    all_finite,
    balanced_start,
    config_changes,
    gpu_peaks,
    host_peak_gib,
    make_config,
    make_trainer,
    one_shape,
    random_condition,
    random_roles,
    role_update,
)  # fmt: skip
from common.video import VideoSpec
from stage2_distill.checkpointing.staging import HostBuffers, StagedState, allocate_host_buffers, build_cpu_mesh
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.dmd.rollout_reuse import RolloutReuse
from stage2_distill.dmd.schedule import CRITIC, STUDENT
from stage2_distill.monitoring.metrics_log import StepResult
from stage2_distill.planning.network_size import TransformerSize
from stage2_distill.resume import training_state
from stage2_distill.trainer import Trainer, train_step

FORWARD_TFLOP = TransformerSize().pass_flops(VideoSpec().num_tokens).total / 1e12  # of one pass at the true size
USEFUL_FORWARDS = {CRITIC: 2.5 + 3, STUDENT: 1.5 + 3 + 3}  # rollout, three for a gradient, scores
WAIT_EVENTS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def run_iteration(case: Case, trainer: Trainer, iteration: int) -> StepResult:
    """Run one iteration of the trainer on random data."""
    ranks = trainer.ranks
    batches = trainer.schedule.micro_batches(start=iteration, rank=ranks.rank, shapes=one_shape(case.spec))
    return train_step(trainer, iteration, ((part, random_condition(case)) for part in batches))


def measure_iterations(case: Case, trainer: Trainer, facts: dict[str, float]) -> Iterator[Row]:
    """Time whole iterations: all that a run does except data and files. The EMA is updated in GPU memory."""
    # an average that starts later would need pinned memory in between, which takes 20 s
    trainer = replace(trainer, schedule=replace(trainer.schedule, ema_start=0))
    count = int(facts["count"])
    start = balanced_start(trainer.schedule, count)
    began = perf_counter()
    run_iteration(case, trainer, start - trainer.schedule.student_update_interval)
    sync()
    trainer.timer.read_seconds()
    yield "first iteration of both roles, compilation included", f"{perf_counter() - began:.1f} s"
    yield "peak host memory of rank 0", f"{host_peak_gib():.1f} GiB, the average included"
    began, steps, ends = perf_counter(), [], []
    for number in range(start, start + count):
        steps.append(run_iteration(case, trainer, number))
        ends.append(perf_counter() - began)
    sync()
    seconds = (perf_counter() - began) / count
    each = [end - before for before, end in zip([0.0, *ends], ends, strict=False)]
    yield f"iterations {start} to {start + count - 1}, seconds (exits)", ", ".join(map(describe_step, steps, each))
    yield from mean_iteration_rows(case, trainer, facts, seconds)
    # each step returns the phases of the step before it: the last ones are read here
    read = [step.seconds for step in steps] + [trainer.timer.read_seconds()]
    phases = {name: sum(phase.get(name, 0) for phase in read) / count for name in read[0]}
    yield "phases of a mean iteration", ", ".join(f"{name} {value:.3f} s" for name, value in phases.items())
    losses = [update.loss for step in steps for update in (step.student, step.critic) if update is not None]
    yield "losses finite", f"{all_finite(losses)}, {len(losses)} updates"


def describe_step(step: StepResult, seconds: float) -> str:
    """Return the time and the exits of an iteration."""
    student = "" if step.student is None else f"student {step.student.exit_index}, "
    critic = "" if step.critic is None else f"critic {step.critic.exit_index}"
    return f"{seconds:.2f} ({student}{critic})"


def mean_iteration_rows(case: Case, trainer: Trainer, facts: dict[str, float], seconds: float) -> Iterator[Row]:
    """Yield the time, utilization and memory of a mean iteration."""
    schedule, reuses = trainer.schedule, isinstance(trainer.accumulator.critic_rollouts, RolloutReuse)
    saved = (2.5 - len(schedule.timesteps) / schedule.student_update_interval) * reuses
    forwards = USEFUL_FORWARDS[CRITIC] - saved + USEFUL_FORWARDS[STUDENT] / schedule.student_update_interval
    useful = forwards * FORWARD_TFLOP / seconds
    yield "mean iteration", f"{seconds:.3f} s, {trainer.ranks.world / seconds:.3f} samples/s"
    yield "useful arithmetic", f"{useful:.0f} TFLOP/s a GPU, {useful / facts['ceiling']:.1%} of the measured ceiling"
    yield "peak memory, of the rank with most", gpu_peaks(case)


def measure_reuse(case: Case, trainer: Trainer, facts: dict[str, float]) -> Iterator[Row]:
    """Time whole iterations in which one rollout serves the critic's updates between two student updates."""
    reused = RolloutReuse(trainer.accumulator.student_rollouts, trainer.schedule)
    reusing = replace(trainer, accumulator=replace(trainer.accumulator, critic_rollouts=reused))
    for name, value in measure_iterations(case, reusing, facts):
        yield f"rollout reuse, {name}", value


def measure_updates(case: Case, trainer: Trainer, facts: dict[str, float]) -> Iterator[Row]:
    """Estimate a mean iteration quickly: for each role one update that leaves at step 1 and one at step 2."""
    averages = {}
    for role in (CRITIC, STUDENT):
        if not case.tiny or role == CRITIC:
            first = time_call(role_update(case, trainer, role, 0), warm=0, repeats=1)
            yield f"first {role} update", f"{first:.1f} s"
        each = []
        for exit_index in (1, 2):  # their mean is the mean of all four
            each.append(time_call(role_update(case, trainer, role, exit_index), warm=0, repeats=1))
            yield f"{role} update, exit {exit_index}", f"{each[-1]:.2f} s"
        averages[role] = mean(each)
        yield f"peak memory after the {role}'s", gpu_peaks(case)
    seconds = averages[CRITIC] + averages[STUDENT] / trainer.schedule.student_update_interval
    yield from mean_iteration_rows(case, trainer, facts, seconds)


def measure_exposed(case: Case, trainer: Trainer, _facts: dict[str, float]) -> Iterator[Row]:
    """Measure how much of an update of each role is communication that nothing hides."""
    for role in (CRITIC, STUDENT):
        yield from communication_rows(role_update(case, trainer, role, 0), case, f"{role} update")


def measure_waits(case: Case, trainer: Trainer, _facts: dict[str, float]) -> Iterator[Row]:
    """Count with the profiler how often the host waits for the device in one iteration of both roles."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (case.device.type == "cuda")
    with profile(activities=activities) as profiler:
        run_iteration(case, trainer, trainer.schedule.student_update_interval)
    counts = {event.key: event.count for event in profiler.key_averages() if event.key in WAIT_EVENTS}
    waits = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield "host waits in an iteration of two updates", waits or "none"


def measure_passes(case: Case, trainer: Trainer, _facts: dict[str, float]) -> Iterator[Row]:
    """Time one forward pass, and one forward and backward pass, of the student."""
    arguments = inputs(case)
    for name, run in (("forward", forward_of), ("forward + backward", backward_of)):
        yield name, f"{time_call(run(trainer.roles.student.net, arguments), warm=1, repeats=2):.4f} s"
    trainer.roles.student.optimizer.zero_grad(set_to_none=True)


def measure_pause(case: Case, trainer: Trainer, _facts: dict[str, float]) -> Iterator[Row]:
    """Measure by how much a checkpoint lengthens the shortest iteration, and the copy to host memory by itself."""
    schedule = trainer.schedule
    shortest = next(
        n for n in range(10_000) if not schedule.is_student_turn(n) and schedule.draw_exit_index(n, CRITIC) == 0
    )
    began, buffers = perf_counter(), HostBuffers()
    allocate_host_buffers(training_state(trainer.roles), buffers)
    yield "room for it in host memory, once in a run, beside training", f"{perf_counter() - began:.1f} s"
    alone = time_call(lambda: run_iteration(case, trainer, shortest), warm=1, repeats=1)
    began = perf_counter()
    state = training_state(trainer.roles)
    staged = StagedState(state, build_cpu_mesh(trainer.ranks), buffers, first=CRITIC)
    issued = perf_counter() - began
    hook = trainer.roles.critic.optimizer.register_step_pre_hook(lambda *_: staged.wait_for_role(CRITIC))
    run_iteration(case, trainer, shortest)
    sync()
    beside = perf_counter() - began
    hook.remove()
    size = sum(value.nbytes for value in state.values()) / 2**30
    yield "pause of a checkpoint", f"{beside - alone:.2f} s beside an iteration of {alone:.2f} s, {size:.1f} GiB"
    began = perf_counter()
    StagedState(state, build_cpu_mesh(trainer.ranks), buffers, first=CRITIC).wait_for_all()
    yield "the copy by itself", f"{perf_counter() - began:.2f} s, begun in {issued:.2f} s"


SECTIONS = {
    "iteration": measure_iterations, "reuse": measure_reuse, "passes": measure_passes, "waits": measure_waits,
    "pause": measure_pause, "updates": measure_updates, "exposed": measure_exposed,
}  # fmt: skip


def measure(options: argparse.Namespace, case: Case, ranks: RankContext) -> Iterator[Row]:
    """Build a trainer and measure the sections of the command line."""
    config = make_config(case, ranks, **config_changes(options))
    facts = {"ceiling": matmul_tflops(case), "count": options.count}
    yield "command", " ".join(sys.argv[1:])
    yield "ranks", str(ranks.world)
    yield "matrix product", f"{facts['ceiling']:.0f} TFLOP/s"
    if options.folder is None:
        built = random_roles(case, ranks, config)
    else:
        if ranks.rank == 0:
            write_in_child(options.folder, options.tiny)
        dist.barrier()
        built, rows = load_roles(ranks, config, options.folder)
        yield from rows
    trainer = make_trainer(case, ranks, config, built)
    for name in options.only.split(","):
        yield from SECTIONS[name](case, trainer, facts)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(
        __doc__, tiny=False, memory="compact", keep="selective", offload="average", attention="auto", replicate=1,
        lora=0, eager=False, folder=Path, only="iteration,reuse,passes,waits,pause", count=20, set="",
    )  # fmt: skip
    case = make_case(options.tiny, half=options.memory == "compact" or options.lora > 0)
    ranks = start_process_group(case.device.type, replicate=options.replicate)
    rows = measure(options, case, ranks)
    run_benchmark("train_step", rows, keep=not options.tiny, rank=ranks.rank, model="random weights")


if __name__ == "__main__":
    main()
