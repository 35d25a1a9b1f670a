"""Each knob of the recipe alone on the nano world, at equal cost, judged by every measure: which helps, which harms?

    python -m benchmarks.ablate_nano --minutes 8 --only "base*"                             # one GPU
    python -m benchmarks.ablate_nano --minutes 8 --only "matching*;regression*;steps*"
    python -m benchmarks.ablate_nano --tiny --only "regression*"                            # tries the code on a CPU

Trains variants of `recipes/nano.yaml` and `recipes/nano-matching.yaml` as CUDA graphs, --at-once of them together, and
appends a table and the figures of every run (JSON lines) to --out. The plan is printed first: all runs but those
named longer take the same number of forward passes, as many as fit into --minutes by the time measured for one.
--only takes patterns of names, --seeds a number of training seeds for all variants, --iterations those of the base.
--rounds iterations are timed for the plan; they should be a multiple of the exits, which take turns. Rates fall over
the same share of a run as in its recipe. Float32, with TF32 for products on a GPU. `ablation_table` joins files.
--thorough also tells decoded clips from the teacher's, and adds true clips to the controls, for a final table.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from benchmarks.ablation_table import COLUMNS, CURVE_COLUMNS, Result, curve_rows, table_rows
from benchmarks.graphed_run import ConditionPool, GraphedRun, forward_passes
from benchmarks.nano_judge import JUDGE_SEED, SHIFT, TRAIN_SEED, Judge, JudgeSettings, Reference, make_pool
from benchmarks.runner import RESULTS, append_results, parse_arguments, results_path, sync
from common.device import pick_device
from common.flow import shift
from common.options import resolve_config
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.model.transformer import WanTransformer
from stage2_distill.model.wan import load_transformer, make_denoiser
from stage2_distill.model.weight_loading import copy_weights
from stage2_distill.trainer import DivergedError

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "nano" / "model"
BASE, MATCHING = "nano.yaml", "nano-matching.yaml"
CHECK_EVERY = 100  # iterations
CURVE_POINTS = 8  # of a run whose distances are followed
BRIEF_SHARE = 0.2  # of a judgement's time that a point of a curve takes
SAFETY = 0.93  # of the time, for what is measured too low
TINY = {
    "train": 8, "held": 8, "batch": 2, "teacher_steps": 2, "classifier_steps": 2, "clips": 2, "at_once": 1, "rounds": 1,
}  # fmt: skip
KNOBS = {
    "IDA 0.03": {"ida_share": 0.03},
    "exit weights 0.25, 1, 1, 1": {"exit_weights": (0.25, 1.0, 1.0, 1.0)},
    "temporal variance 0.05": {"temporal_variance_weight": 0.05},
    "anchor 0.05": {"anchor_weight": 0.05},
    "guidance 1.5": {"guidance_scale": 1.5},
    "guidance 1.5, decoupled": {"guidance_scale": 1.5, "decoupled_guidance": True},
    "guidance 1.5, rescale 0.7": {"guidance_scale": 1.5, "guidance_rescale": 0.7},
}
BASE_KNOBS = {
    "batch 256": {"batch_size": 256, "global_batch": 256},
    "weight 8": {"regression_weight": 8.0},
    "critic 5e-5": {"critic_lr": 5e-5},
    "no regression": {"regression_weight": 0.0},
    "20 steps of regression": {"regression_steps": 20},
    "no averaged critic": {"critic_ema_decay": 0.0},
    "no low sigmas": {"score_time_low_share": 0.0, "critic_time_low_share": 0.0},
}
MATCHING_KNOBS = {
    "averaged critic 0.99": {"critic_ema_decay": 0.99},
    "low sigmas 0.3": {"score_time_low_share": 0.3, "critic_time_low_share": 0.3},
}


@dataclass(frozen=True)
class Variant:
    """A recipe with some options changed."""

    name: str
    recipe: str
    changes: dict[str, object] = field(default_factory=dict)
    compared_with: str = ""
    warmup_share: float = 0.0  # of the iterations, which only regress; 1 = regression alone, without a critic
    seeds: int = 2
    curve: bool = False
    length: float = 1.0  # its forward passes over those of others

    def config(self, iterations: int | None = None, **others: object) -> DistillConfig:
        """Its options for a number of iterations; spans of iterations keep their share of the recipe's run."""
        paths = {"config": str(ROOT / "recipes" / self.recipe), "shards": ("-",), "model": str(MODEL), "out": "-"}
        recipe = resolve_config(DistillConfig, paths)
        count = iterations or recipe.iterations
        spans = {
            name: round(getattr(recipe, name) * count / recipe.iterations) for name in ("lr_cooldown", "critic_warmup")
        }
        return replace(
            recipe, **spans, iterations=count, teacher_warmup=round(self.warmup_share * count),
            rollout_reuse=False, **(self.changes | others),
        )  # fmt: skip


def list_variants() -> list[Variant]:
    """All variants, the important ones first."""
    knobs = [("warm-up 0.2", {}, 0.2), *((name, changes, 0.0) for name, changes in KNOBS.items())]
    variants = [
        Variant("base", BASE, seeds=3, curve=True),
        Variant("regression alone", BASE, compared_with="base", warmup_share=1.0, seeds=3),
        Variant("matching", MATCHING, compared_with="base", seeds=3, curve=True),
        Variant("longer: base x 4", BASE, compared_with="base", seeds=1, length=4.0),
        Variant("longer: regression alone x 4", BASE, {}, "base", warmup_share=1.0, seeds=1, length=4.0),
        Variant("steps: 2", BASE, {"timesteps": (1000.0, 500.0)}),
        Variant("steps: 8", BASE, {"timesteps": tuple(1000.0 - 125 * step for step in range(8))}),
    ]
    for block, recipe, more in (("base", BASE, BASE_KNOBS), ("matching", MATCHING, MATCHING_KNOBS)):
        for name, changes, share in [*((name, changes, 0.0) for name, changes in more.items()), *knobs]:
            # what guidance adds is in the row of guidance alone; its other knobs are compared with that
            other = f"{block}, guidance 1.5" if name.startswith("guidance 1.5,") else block
            variants.append(Variant(f"{block}, {name}", recipe, changes, other, share))
    return variants


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be made."""

    variant: Variant
    config: DistillConfig

    def result(self, iteration: int, measures: object) -> Result:
        """What it came to at an iteration."""
        config, variant = self.config, self.variant
        passes = forward_passes(config) * config.iterations
        return Result(
            variant.name, variant.compared_with, config.seed, iteration, config.iterations, passes,
            config.guidance_scale, len(config.timesteps), measures,
        )  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """What all runs share."""

    ranks: RankContext
    pool: ConditionPool
    teacher: WanTransformer
    student: WanTransformer  # takes the weights that are judged
    judge: Judge
    references: dict[float, Reference]  # by guidance scale
    results: Path

    def open_run(self, planned: PlannedRun) -> GraphedRun:
        """The run with its graphs recorded."""
        run = GraphedRun(planned.config, MODEL, self.teacher, self.pool, self.ranks)
        run.record_graphs()
        return run

    def judge_weights(self, planned: PlannedRun, iteration: int, weights: Mapping[str, torch.Tensor]) -> Result:
        """Judge a student, in brief before its last iteration, and write the result."""
        copy_weights(weights.items(), dict(self.student.named_parameters()), {})
        denoiser, brief = make_denoiser(self.student, torch.float32), iteration < planned.config.iterations
        seeds = self.judge.settings.seeds[:1] if brief else self.judge.settings.seeds
        sets = {seed: self.judge.sample_student(denoiser, planned.config.sigmas, seed) for seed in seeds}
        measures = self.references[planned.config.guidance_scale].measure(sets, brief=brief)
        return self.write(planned.result(iteration, measures))

    def write(self, result: Result) -> Result:
        """Append a result to the file, so that nothing is lost if the time ends, and print it."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(result.line())
        print(result.line(), end="", flush=True)
        return result


def control_results(experiment: Experiment) -> Iterator[Result]:
    """The teacher at few steps and the undistilled student, the second last: it costs what a student costs."""
    judge, timesteps = experiment.judge, (1.0, 0.75, 0.5, 0.25)
    sigmas = tuple(shift(step, SHIFT) for step in timesteps)
    facts = {"compared_with": "", "seed": 0, "iteration": 0, "iterations": 0, "passes": 0.0, "steps": len(timesteps)}
    seeds = judge.settings.seeds
    for scale, reference in experiment.references.items():
        for steps in (judge.settings.teacher_steps, len(timesteps)):
            many = steps != len(timesteps)
            sets = {seed: reference.sets[seed] if many else judge.sample_teacher(scale, sigmas, seed) for seed in seeds}
            name = f"teacher, guidance {scale:g}, {steps} steps"
            yield experiment.write(Result(name, guidance_scale=scale, measures=reference.measure(sets), **facts))
    if judge.settings.pixel_test:
        measures = experiment.references[1.0].measure({seeds[0]: judge.true_latents()})
        yield experiment.write(Result("true clips", guidance_scale=1.0, measures=measures, **facts))
    sets = {seed: judge.sample_student(judge.teacher, sigmas, seed) for seed in seeds}
    measures = experiment.references[1.0].measure(sets)
    yield experiment.write(Result("undistilled, 4 steps", guidance_scale=1.0, measures=measures, **facts))


def train_together(
    runs: Sequence[tuple[PlannedRun, GraphedRun]],
) -> Iterator[tuple[PlannedRun, int, Mapping[str, torch.Tensor] | None]]:
    """Train runs side by side; yield the weights at each point of a curve and at the end, None if a run diverged."""
    alive, longest = list(runs), max(planned.config.iterations for planned, _ in runs)
    for step in range(1, longest + 1):
        for pair in list(alive):
            planned, run = pair
            count, points = planned.config.iterations, CURVE_POINTS if planned.variant.curve else 1
            while run.iteration < step * count // longest:  # shorter runs spread over the same time
                run.iterate()
                if run.iteration * points // count > (run.iteration - 1) * points // count:
                    yield planned, run.iteration, run.average_weights()
            if step % CHECK_EVERY == 0 or step == longest:
                try:
                    run.check_finite()  # and the host does not run far ahead
                except DivergedError:
                    yield planned, count, None
                    alive.remove(pair)


def run_group(experiment: Experiment, group: Sequence[PlannedRun]) -> Iterator[Result]:
    """Train some runs together, then judge them."""
    began = sync()
    runs = [(planned, experiment.open_run(planned)) for planned in group]
    recorded = sync()
    found = list(train_together(runs))
    print(f"{len(group)} runs: recorded in {recorded - began:.1f} s, trained in {sync() - recorded:.1f} s", flush=True)
    diverged = [planned for planned, _, weights in found if weights is None]
    for planned in diverged:
        yield experiment.write(planned.result(planned.config.iterations, None))
    for planned, iteration, weights in found:
        if weights is not None and planned not in diverged:
            yield experiment.judge_weights(planned, iteration, weights)


@dataclass(frozen=True)
class Speed:
    """Measured seconds."""

    one_pass: float  # of the device, when runs are trained together
    recording: float  # of a run's graphs
    judging: float  # of a run


def measure_speed(experiment: Experiment, at_once: int, judging: float, rounds: int, **sizes: int) -> Speed:
    """Time a few iterations of the base, several runs together."""
    group = [PlannedRun(list_variants()[0], list_variants()[0].config(seed=seed, **sizes)) for seed in range(at_once)]
    began = sync()
    runs = [experiment.open_run(planned) for planned in group]
    recorded = sync()
    for _ in range(rounds):
        for run in runs:
            run.iterate()
    trained = sync()
    error = runs[0].graph_error()
    print(f"student of the graphs against that of single updates: {error:.2e} of the way moved", flush=True)
    passes = rounds * at_once * forward_passes(group[0].config)
    return Speed((trained - recorded) / passes, (recorded - began) / at_once, judging)


def plan_runs(
    variants: Sequence[Variant], options: argparse.Namespace, speed: Speed, left: float, **sizes: int
) -> list[PlannedRun]:
    """All runs with equal numbers of forward passes, as many as fit into `left` seconds; the plan is printed."""
    pairs = [(variant, seed) for seed in range(10) for variant in variants if seed < (options.seeds or variant.seeds)]
    points = sum(CURVE_POINTS - 1 for variant, _ in pairs if variant.curve)
    fixed = len(pairs) * (speed.recording + speed.judging) + points * BRIEF_SHARE * speed.judging
    batch = list_variants()[0].config(**sizes).batch_size  # a pass of a larger one takes longer
    lengths = sum(one.length * one.config(**sizes).batch_size / batch for one, _ in pairs)
    budget = (SAFETY * left - fixed) / (lengths * speed.one_pass)
    if options.iterations:
        budget = options.iterations * forward_passes(list_variants()[0].config())
    if budget <= 0:
        short = f"{len(pairs)} runs take {fixed:.0f} s besides training, and {left:.0f} s are left"
        raise SystemExit(f"minutes={options.minutes:g}: {short}; give fewer with --only or --seeds")
    planned = []
    for variant, seed in pairs:
        count = max(1, round(variant.length * budget / forward_passes(variant.config())))
        planned.append(PlannedRun(variant, variant.config(count, seed=seed, **sizes)))
    cost = forward_passes(list_variants()[0].config())
    print(f"{1000 * cost * speed.one_pass:.2f} ms per iteration and run of the base, {speed}")
    print(f"{len(pairs)} runs of {budget:.0f} forward passes, {fixed + lengths * budget * speed.one_pass:.0f} s")
    for one in planned:
        if one.config.seed == 0:
            print(f"  {one.config.iterations:6d} iterations: {one.variant.name}", flush=True)
    return planned


def open_experiment(options: argparse.Namespace, scales: Sequence[float], name: str = "ablate_nano") -> Experiment:
    """Make conditions, and sample the teacher's sets on those of the judge."""
    device = pick_device("auto")
    ranks = replace(start_process_group("cpu"), device=device)  # one process, which needs no NCCL
    settings = JudgeSettings(
        (0, 1) if options.tiny else (0, 1, 2),
        options.teacher_steps,
        options.classifier_steps,
        options.clips,
        options.thorough,
    )
    pool, _ = make_pool(MODEL, options.train, seed=TRAIN_SEED, held=False, device=device)
    held, asked = make_pool(MODEL, options.held, seed=JUDGE_SEED, held=True, device=device)
    vae = AutoencoderKLWan.from_pretrained(MODEL / "vae").float().to(device)
    teacher, student = (
        load_transformer(MODEL, torch.float32, ExecutionPlan(compiled=compiled)).to(device).requires_grad_(False)
        for compiled in (options.compile, False)
    )
    shape = Variant("base", BASE).config().spec.latent_shape
    plain = make_denoiser(load_transformer(MODEL, torch.float32).to(device).requires_grad_(False), torch.float32)
    judge = Judge(held, asked, vae, plain, shape, settings, most_steps=8)
    references = {scale: Reference(judge, scale) for scale in scales}
    return Experiment(ranks, pool, teacher, student, judge, references, results_path(name, "jsonl", options.out))


def main() -> None:
    """Plan, train, judge and write the table."""
    options = parse_arguments(
        __doc__, minutes=8.0, only="*", seeds=0, iterations=0, at_once=4, rounds=8, train=16384, held=8192, batch=0,
        teacher_steps=50, classifier_steps=200, clips=1024, compile=False, thorough=False, tiny=False, out=RESULTS,
    )  # fmt: skip
    began = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.tiny:
        vars(options).update(TINY, iterations=options.iterations or 1, seeds=options.seeds or 1)
    patterns = options.only.split(";")
    variants = [one for one in list_variants() if any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not variants:
        raise SystemExit(f"only={options.only}: matches none of {'; '.join(one.name for one in list_variants())}")
    sizes = {"compile": options.compile}
    if options.batch:
        sizes |= {"batch_size": options.batch, "global_batch": options.batch}
    scales = {1.0, *(variant.config().guidance_scale for variant in variants)}
    experiment = open_experiment(options, sorted(scales))
    results, marks = [], [sync()]
    for result in control_results(experiment):
        results.append(result)
        marks.append(sync())
    print(f"conditions, teacher and controls: {marks[-1] - began:.1f} s", flush=True)
    speed = measure_speed(experiment, options.at_once, marks[-1] - marks[-2], options.rounds, **sizes)
    left = 60 * options.minutes - (time.perf_counter() - began)
    planned = plan_runs(variants, options, speed, left, **sizes)
    for start in range(0, len(planned), options.at_once):
        first = time.perf_counter()
        results += run_group(experiment, planned[start : start + options.at_once])
        spent, took, rest = time.perf_counter() - began, time.perf_counter() - first, planned[start + options.at_once :]
        print(f"{spent:.0f} s, {len(rest)} runs are left", flush=True)
        if rest and not options.iterations and spent + took > 60 * options.minutes:
            print("they do not fit into the time")
            break
    append_results("ablate_nano", table_rows(results), model="examples/nano", columns=COLUMNS, folder=options.out)
    append_results("ablate_nano", curve_rows(results), model="examples/nano", columns=CURVE_COLUMNS, folder=options.out)


if __name__ == "__main__":
    main()
