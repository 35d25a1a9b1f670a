"""One student of several sizes and lengths against students of one size.

    python -m examples.nano.build --out WORK/model --pictures WORK --sizes 64x96 96x64 64x64 --frames 9 17
    python -m examples.nano.shapes --model WORK/model --out WORK/shapes [--jobs 6] [--seconds 330]

Each student has the same number of updates in total. Every size has a data set of its own; the first mixes them all.
The students, and then the comparisons, are made by --jobs processes at once: one alone leaves most of a GPU idle.
Writes OUT/shapes.md: distances in floors on each size and length. What is complete in OUT is kept if it is stopped.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import torch

from common.options import resolve_config
from common.video import FrameSize, parse_frame_size
from examples.nano.clips import CLIPS_SEED, PROMPTS_SEED, write_conditions
from shards.comparison import Comparison, latent_set_name
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage2_distill.config import DistillConfig
from stage2_distill.evaluation.compare import open_evaluation, sample_sets, student_samplers, teacher_samplers
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import collect_sums, frechet_distance
from stage2_distill.sampling.student_source import find_student
from stage2_distill.train import distill

FOLDER, ROOT = Path(__file__).parent, Path(__file__).parents[2]
MANY, PROBE, PROBE_ITERATIONS = "many", "probe", 8
HEAD = ("size", "frames", "many shapes, floors", "one size, floors", "ratio (accepted up to 1.15)")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="teacher of all sizes and lengths")
    parser.add_argument("--out", type=Path, default=Path("shapes"))
    parser.add_argument(
        "--sizes", type=parse_frame_size, nargs="+", default=[FrameSize(64, 96), FrameSize(96, 64), FrameSize(64, 64)]
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[9, 17])
    parser.add_argument("--records", type=int, default=8192, help="training conditions of each size")
    parser.add_argument("--held-out", type=int, default=8192, help="conditions of the comparison, of each size")
    parser.add_argument("--iterations", type=int, default=3200)
    parser.add_argument(
        "--seconds", type=float, help="fewer iterations, as many as the first student makes in this time"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--each-length", action="store_true", help="one size means one length too: twice the students")
    parser.add_argument("--regression-alone", action="store_true", help="students without matching: half of the time")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--only-data", action="store_true", help="end when the conditions are encoded")
    return parser.parse_args()


def make_data(args: argparse.Namespace, size: FrameSize, held: bool) -> Path:
    """Draw first frames of one size and encode them; returns the data set."""
    name, count = ("held", args.held_out) if held else ("train", args.records)
    folder = args.out / "conditions" / f"{size}-{name}"
    table, seed = folder / f"{name}.csv", PROMPTS_SEED if held else CLIPS_SEED
    if not table.exists():
        write_conditions(folder, f"{name}.csv", seed=seed, count=count, held=held, sizes=[size])
    out = args.out / "data" / f"{size}-{name}"
    options = {"config": FOLDER / "encode.yaml", "data": str(table), "out": str(out), **vars(size)}
    options["workers"] = share_cores(args.jobs)
    encode(resolve_config(EncodeConfig, options | {"model": args.model, "device": args.device}))
    return out


def train(args: argparse.Namespace, name: str, data: Sequence[Path], frames: Sequence[int], iterations: int) -> Path:
    """Train a student by the recipe of the nano world; returns its run."""
    out = args.out / "runs" / name
    height, width = (int(part) for part in data[0].name.partition("-")[0].split("x"))
    options: dict[str, object] = {
        "config": ROOT / "recipes" / "nano.yaml", "model": args.model, "out": str(out), "device": args.device,
        "shards": tuple(map(str, data)), "num_frames": ",".join(map(str, frames)), "height": height, "width": width,
        "iterations": iterations, "lr_cooldown": iterations * 3 // 5,  # as much of the run as in the recipe
        "compile": args.compile, "batch_size": args.batch_size, "global_batch": args.batch_size,
    }  # fmt: skip
    if args.regression_alone:
        options |= {"teacher_warmup": iterations, "student_lr": 3e-4}
    distill(resolve_config(DistillConfig, options))
    return out


def count_iterations(args: argparse.Namespace, data: Sequence[Path]) -> int:
    """The iterations of every student: those that the student of all shapes makes in --seconds, as a trial tells."""
    if args.seconds is None:
        return int(args.iterations)
    run = train(args, PROBE, data, args.frames, PROBE_ITERATIONS)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = median(line["seconds"] for line in lines[PROBE_ITERATIONS // 2 :])  # without the first, slow ones
    count = max(1, min(args.iterations, int(args.seconds / seconds)))
    print(f"{seconds:.2f} s an iteration alone: {count} iterations", flush=True)
    return count


def compare(args: argparse.Namespace, runs: Sequence[Path], held: Path, frames: int) -> list[float]:
    """Distances of the students to the teacher in floors, means over the seeds."""
    out = args.out / "comparisons" / f"{held.name}-{frames}"
    options = {"checkpoint": tuple(map(str, runs)), "shards": str(held), "model": args.model, "out": str(out)}
    options |= {"num_records": args.held_out, "num_frames": frames, "seeds": tuple(range(args.seeds)), "videos": 0}
    options |= {"batch_size": 2048, "dtype": "float32", "max_text_tokens": 32, "device": args.device}
    setting = open_evaluation(resolve_config(EvaluateConfig, options | {"teacher_steps": args.steps}))
    sources = [find_student(str(run), args.model) for run in runs]
    comparison = sample_sets(setting, [teacher_samplers(setting)[0], *student_samplers(setting, sources)])
    floors = count_floors(setting.store, comparison)
    print(f"{held.name}, {frames} frames: {', '.join(f'{one:.2f}' for one in floors)} floors", flush=True)
    return floors


def count_floors(store: Path, comparison: Comparison) -> list[float]:
    """Distances of the candidates after the teacher, in those of the teacher's own sets."""
    # the other measures of `evaluate` are left out: a classifier for each set takes minutes
    features = {
        name: torch.cat([one[0] for one in parts]) for name, parts in collect_sums(store, comparison).features.items()
    }
    references = [features[latent_set_name(comparison.teacher, seed)] for seed in comparison.references]
    distances = []
    for candidate in comparison.contestants:
        own = [features[latent_set_name(candidate, seed)] for seed in comparison.seeds]
        distances.append(fmean(frechet_distance(*pair) for pair in zip(own, references, strict=True)))
    return [distance / distances[0] for distance in distances[1:]]


def share_cores(jobs: int) -> int:
    """The processor cores of one of so many processes."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def start_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that share the cores and the GPU."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (share_cores(jobs),))


def measure(args: argparse.Namespace, pool: ProcessPoolExecutor) -> list[tuple[object, ...]]:
    """Make everything that is missing; returns the rows of the table."""

    def run_all(work: Callable[..., object], jobs: Sequence[tuple[object, ...]]) -> list:
        return [task.result() for task in [pool.submit(work, args, *job) for job in jobs]]

    parts = [(size, held) for held in (False, True) for size in args.sizes]
    data = dict(zip(parts, run_all(make_data, parts), strict=True))
    if args.only_data:
        return []
    mixed = [data[size, False] for size in args.sizes]
    iterations = pool.submit(count_iterations, args, mixed).result()
    groups = [[frames] for frames in args.frames] if args.each_length else [list(args.frames)]
    alone = [(size, lengths) for size in args.sizes for lengths in groups]
    students = [(MANY, mixed, args.frames, iterations)]
    for size, lengths in alone:
        students.append((f"{size}-{'-'.join(map(str, lengths))}", [data[size, False]], lengths, iterations))
    many, *others = run_all(train, students)
    shapes = [(size, frames, run) for (size, lengths), run in zip(alone, others, strict=True) for frames in lengths]
    floors = run_all(compare, [([many, run], data[size, True], frames) for size, frames, run in shapes])
    return [
        (size, frames, f"{one:.2f}", f"{other:.2f}", f"{one / other:.3f}")
        for (size, frames, _), (one, other) in zip(shapes, floors, strict=True)
    ]


def main() -> None:
    """Print and write the table."""
    args = arguments()
    with start_pool(args.jobs) as pool:
        rows = measure(args, pool)
    if rows:
        lines = [" | ".join(map(str, row)) for row in (HEAD, ("---",) * len(HEAD), *rows)]
        text = "".join(f"| {line} |\n" for line in lines)
        (args.out / "shapes.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
