"""Students of the nano world by every measure of the ablation: runs of `distill`, or files of weights.

    python -m benchmarks.judge_students RUN [RUN ...] [--thorough] [--controls] [--precision fp8]

Held-out conditions of the judge's seed, which nothing else uses, and three draws of noise; the teacher without guidance
is the reference. Of a run all checkpoints are judged, those before the last in brief. The end of a run's name, such as
in base-2, is the number of its training seed. fp8 and bfloat16 compute in bfloat16. Results are appended to --out as
JSON lines, for `python -m benchmarks.ablation_table`; --tiny is for a CPU.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.ablate_nano import MODEL, TINY, Experiment, control_results, open_experiment
from benchmarks.ablation_table import COLUMNS, CURVE_COLUMNS, Result, curve_rows, table_rows
from benchmarks.runner import RESULTS, append_results
from stage2_distill.checkpointing.format import list_checkpoints
from stage2_distill.config import FP8
from stage2_distill.low_precision.fp8_support import store_weights_in_fp8
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.wan import make_denoiser
from stage2_distill.sampling.student_sampler import load_student
from stage2_distill.sampling.student_source import find_student

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, FP8: torch.bfloat16}
SIZES = {"held": 8192, "train": 8, "clips": 1024, "teacher_steps": 50, "classifier_steps": 700}


def judge_student(experiment: Experiment, path: Path, precision: str, facts: Mapping[str, str]) -> Result:
    """Judge a checkpoint or a file of weights, and write the result."""
    source, judge = find_student(str(path), str(MODEL), best=False), experiment.judge
    net = load_student(
        source.path, ExecutionPlan(), model=str(MODEL), weights="ema", dtype=DTYPES[precision], device=judge.device,
        loras=source.loras,
    )  # fmt: skip
    if precision == FP8:
        store_weights_in_fp8(net)
    denoiser, sigmas = make_denoiser(net, DTYPES[precision]), source.facts.sigmas
    iteration, last = source.facts.iteration, int(facts["iterations"])
    brief = iteration != last
    seeds = judge.settings.seeds[:1] if brief else judge.settings.seeds
    sets = {seed: judge.sample_student(denoiser, sigmas, seed) for seed in seeds}
    measures = experiment.references[1.0].measure(sets, brief=brief)
    name = f"{facts['name']}{'' if precision == 'float32' else f', {precision}'}"
    result = Result(name, "", int(facts["seed"]), iteration, last, 0.0, 1.0, len(sigmas), measures)
    return experiment.write(result)


def judge_run(experiment: Experiment, run: Path, precision: str) -> Iterator[Result]:
    """Judge all checkpoints of a run, or a file."""
    name, _, seed = run.stem.rpartition("-")
    checkpoints = (list_checkpoints(run) if run.is_dir() else []) or [run]
    last = find_student(str(checkpoints[-1]), str(MODEL), best=False).facts.iteration
    facts = {"name": name or run.stem, "seed": seed if seed.isdigit() else "0", "iterations": str(last)}
    for path in checkpoints:
        yield judge_student(experiment, path, precision, facts)


def parse_options() -> argparse.Namespace:
    """The command line; a wrong one, or a student that cannot be found, ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["float32"])
    for flag in ("thorough", "controls", "tiny"):
        parser.add_argument(f"--{flag}", action="store_true")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        for run in options.runs:  # before the teacher samples
            find_student(str(run), str(MODEL), best=False)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """Judge, print each result as it comes, and append the tables to the results."""
    options = parse_options()
    if options.tiny:
        vars(options).update({name: TINY[name] for name, size in SIZES.items() if getattr(options, name) == size})
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    options.compile = False
    experiment = open_experiment(options, [1.0], "judge_students")
    results = list(control_results(experiment)) if options.controls else []
    for run in options.runs:
        for precision in options.precision:
            results += judge_run(experiment, run, precision)
    for columns, rows in ((COLUMNS, table_rows(results)), (CURVE_COLUMNS, curve_rows(results))):
        append_results("judge_students", rows, model="examples/nano", columns=columns, folder=options.out)


if __name__ == "__main__":
    main()
