"""What mixing shapes costs: a mean iteration over three sizes against each size alone; compiled graphs, and memory.

    python -m benchmarks.shapes [--tiny] [--sizes 704x1280,1280x704,960x960] [--count 5] [--clips 2] [--reuse]

With --clips 1 --count 2 (one iteration with the student, one without) about eight minutes on an H200, by arithmetic,
with reused rollouts six.
All runs take the same iterations, so that their rollouts leave at the same steps, with --clips micro-batches of each
size in the mixed run and as many in all in the others. The mixed run comes last: it must find every graph compiled.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.device import Case, make_case
from benchmarks.runner import Row, parse_arguments, run_benchmark, sync
from benchmarks.trainer import balanced_start, make_config, make_trainer, random_condition, random_roles
from common.video import FrameSize, VideoSpec, parse_frame_size
from stage2_distill.config import parse_lengths
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.dmd.video_shapes import SampleShapes
from stage2_distill.trainer import Trainer, train_step

GIB = 2**30


def run_iterations(case: Case, trainer: Trainer, specs: list[VideoSpec], start: int, count: int) -> float:
    """Run iterations whose samples have these shapes in turn, and return the seconds of each."""
    lengths = parse_lengths(specs[0].num_frames)
    shapes = SampleShapes(0, lengths, lambda position: specs[position % len(specs)])
    began = sync()
    for iteration in range(start, start + count):
        parts = trainer.schedule.micro_batches(start=iteration, rank=trainer.ranks.rank, shapes=shapes)
        train_step(trainer, iteration, ((part, random_condition(replace(case, spec=part.spec))) for part in parts))
    return (sync() - began) / count


def measure_run(case: Case, trainer: Trainer, specs: list[VideoSpec], count: int) -> tuple[float, float, float, int]:
    """Seconds of a mean iteration, peak memory in use and reserved in GiB, and graphs that were compiled meanwhile."""
    start, on_gpu = balanced_start(trainer.schedule, count), case.device.type == "cuda"
    before = count_graphs()
    # once with both roles: compilation, and the first allocation of each size
    run_iterations(case, trainer, specs, start - trainer.schedule.student_update_interval, 1)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = run_iterations(case, trainer, specs, start, count)
    used, reserved = (
        (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB) if on_gpu else (0.0, 0.0)
    )
    return seconds, used, reserved, count_graphs() - before


def count_graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(options: argparse.Namespace, case: Case, ranks: RankContext, sizes: list[FrameSize]) -> Iterator[Row]:
    """Measure each size alone, then all of them mixed."""
    specs = [VideoSpec(options.frames, size.height, size.width) for size in sizes]
    config = make_config(
        case, ranks, optimizer_form="compact", activation_checkpointing=options.keep,
        global_batch=ranks.world * len(specs) * options.clips, compile=not (case.tiny or options.eager), ema_start=0,
        rollout_reuse=options.reuse,
    )  # fmt: skip
    yield "command", " ".join(sys.argv[1:])
    trainer = make_trainer(case, ranks, config, random_roles(case, ranks, config))
    alone = {}
    for size, spec in zip(sizes, specs, strict=True):
        alone[size] = measure_run(case, trainer, [spec], options.count)
        yield f"{size} alone, {spec.num_tokens} tokens", describe_run(alone[size])
    mixed = measure_run(case, trainer, specs, options.count)
    yield "mixed", describe_run(mixed)
    # Each size has as many samples as the others, so the mean of the runs alone weights them as the mixed run does.
    expected = sum(run[0] for run in alone.values()) / len(alone)
    yield "mixed / mean of those alone (accepted up to 1.02)", f"{mixed[0] / expected:.4f}"
    largest = max(run[1] for run in alone.values())
    yield "peak of mixed beyond the largest alone (accepted up to 1 GiB)", f"{mixed[1] - largest:+.2f} GiB"
    yield "graphs compiled by the mixed run (accepted: 0)", str(mixed[3])


def describe_run(run: tuple[float, float, float, int]) -> str:
    """Return what was measured of a run in words."""
    seconds, used, reserved, graphs = run
    return f"{seconds:.3f} s an iteration, peak {used:.1f} GiB, reserved {reserved:.1f}; {graphs} graphs compiled"


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(
        __doc__, tiny=False, sizes="704x1280,1280x704,960x960", frames=121, count=5, clips=2, keep="selective",
        eager=False, reuse=False,
    )  # fmt: skip
    case = make_case(options.tiny, half=True)
    sizes = [parse_frame_size(text) for text in options.sizes.split(",")]
    if options.tiny:
        options.frames, sizes = 9, [FrameSize(64, 96), FrameSize(96, 64), FrameSize(64, 64)]
    ranks = start_process_group(case.device.type)
    rows = measure(options, case, ranks, sizes)
    run_benchmark("shapes", rows, keep=not options.tiny, rank=ranks.rank, model="random weights")


if __name__ == "__main__":
    main()
