"""The table of `ablate_nano`: a row per variant, with intervals over seeds and what differs from the row it changes.

    python -m benchmarks.ablation_table RESULTS.jsonl [MORE.jsonl ...]

prints the table of one or several runs together, so that seeds can be added later. Rows are compared by how far each
measure is from the teacher's: `nearer` and `farther` name those whose difference has a 95 % interval without 0
(Student's t, deviation of the seeds of both rows). One comparison in twenty says so by chance.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.nano_judge import MEASURES, Measures
from stage2_distill.evaluation.latent_metrics import STUDENT_T, seed_statistics

PERFECT = {"accuracy": 0.5, "pixel_accuracy": 0.5} | dict.fromkeys(
    ("floors", "floors_tanh", "floors_spectral"), 0.0
)  # the others: 1
COLUMNS = ("variant", "seeds", "iterations", *(name.replace("_", " ") for name in MEASURES), "nearer", "farther")
CURVE_COLUMNS = ("variant", "iteration", *COLUMNS[5:11])


@dataclass(frozen=True)
class Result:
    """What one run, or a control, came to at one iteration."""

    variant: str
    compared_with: str  # the variant that this one changes; "" = none
    seed: int
    iteration: int
    iterations: int  # of the whole run
    passes: float  # forward passes of the whole run
    guidance_scale: float
    steps: int
    measures: Measures | None  # None = diverged

    @property
    def is_last(self) -> bool:
        """Whether it is that of the last iteration."""
        return self.iteration == self.iterations

    def line(self) -> str:
        """The result as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def read_results(path: Path) -> list[Result]:
    """The results of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Result(**row | {"measures": row["measures"] and Measures(**row["measures"])}) for row in rows]


def teacher_error(name: str, value: float) -> float:
    """How far a measure is from the teacher's, 0 = not at all."""
    return abs(value - PERFECT.get(name, 1.0))


def values_of(results: Iterable[Result], name: str) -> list[float]:
    """A measure by run, without those that diverged or did not measure it."""
    found = [getattr(one.measures, name) for one in results if one.measures is not None]
    return [value for value in found if value is not None]


def error_difference(own: Sequence[float], other: Sequence[float]) -> int:
    """-1 if the first errors are smaller by more than chance, 1 if larger, 0 if neither can be said."""
    freedom = len(own) + len(other) - 2
    if min(len(own), len(other)) == 0 or freedom < 1:
        return 0
    squares = sum((value - statistics.fmean(part)) ** 2 for part in (own, other) for value in part)
    point = STUDENT_T[freedom - 1] if freedom <= len(STUDENT_T) else 2.2
    half = point * math.sqrt(squares / freedom * (1 / len(own) + 1 / len(other)))
    difference = statistics.fmean(own) - statistics.fmean(other)
    return 0 if abs(difference) <= half else int(math.copysign(1, difference))


def describe(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval."""
    if not values:
        return "-"
    summary = seed_statistics(values)
    return f"{summary.mean:.3f}" + (f" ± {summary.high - summary.mean:.3f}" if summary.high is not None else "")


def table_rows(results: Sequence[Result]) -> list[list[str]]:
    """The rows of the table, in the order of the variants' first results."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for one in results:
        if one.is_last:
            groups[one.variant].append(one)
    rows = []
    for name, group in groups.items():
        other, differing = groups.get(group[0].compared_with, []), {-1: list[str](), 1: list[str]()}
        for measure in MEASURES:
            own, base = (
                [teacher_error(measure, value) for value in values_of(part, measure)] for part in (group, other)
            )
            differing.get(error_difference(own, base), []).append(measure.replace("_", " "))
        diverged = sum(one.measures is None for one in group)
        seeds = f"{len(group)}" + f", {diverged} diverged" * bool(diverged)
        cells = [describe(values_of(group, measure)) for measure in MEASURES]
        iterations = " to ".join(map(str, sorted({one.iterations for one in group})))
        rows.append([name, seeds, iterations, *cells, *(", ".join(differing[sign]) or "-" for sign in (-1, 1))])
    return rows


def curve_rows(results: Sequence[Result]) -> list[list[str]]:
    """The rows of the curves: distances and ratios by iteration, of the variants that were measured on the way."""
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    named = {one.variant for one in results if not one.is_last}
    for one in results:
        if one.variant in named:
            groups[one.variant, one.iteration].append(one)
    return [
        [variant, str(iteration), *(describe(values_of(group, measure)) for measure in MEASURES[2:8])]
        for (variant, iteration), group in sorted(groups.items())
    ]


def main() -> None:
    """Print the tables of files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    results = [one for path in parser.parse_args().files for one in read_results(path)]
    for columns, rows in ((COLUMNS, table_rows(results)), (CURVE_COLUMNS, curve_rows(results))):
        print("\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)), end="\n\n")


if __name__ == "__main__":
    main()
