"""Describing a data set: what is in it, and which records stand out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from shards.manifest import Manifest
from shards.verification.check_shard import Findings, Problem

FAR = 10.0  # robust standard deviations from the median that make an outlier
SHOWN = 20  # outliers and kinds of sources in a printed report


@dataclass(frozen=True)
class Outlier:
    """A record whose latent or text is much larger or smaller than usual: worth a look, not broken."""

    file: str
    key: str
    tensor: str
    rms: float
    median: float

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.tensor} has an rms of {self.rms:.4g}, the median is {self.median:.4g}"


@dataclass(frozen=True)
class Spread:
    """Lowest, median, mean and highest value."""

    low: float
    median: float
    mean: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}, median {self.median:.4g}, mean {self.mean:.4g}"


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    where: str
    manifest: Manifest | None  # None = cannot be read
    problems: tuple[Problem, ...]
    outliers: tuple[Outlier, ...]
    spreads: Mapping[str, Spread]
    sources: Mapping[str, int]  # most frequent first

    def lines(self) -> list[str]:
        """The report in words."""
        shown = [f"{self.where}: {len(self.problems)} problems, {len(self.outliers)} outliers"]
        if self.manifest is not None:
            rows = sum(shard.rows for shard in self.manifest.shards)
            shown.append(
                f"{self.manifest.records} records + {self.manifest.failures} failures = {rows} rows"
                f" in {len(self.manifest.shards)} shards; {self.manifest.spec}"
            )
        shown += [f"{name}: {spread}" for name, spread in self.spreads.items()]
        shown += [f"{count} records from {kind}" for kind, count in list(self.sources.items())[:SHOWN]]
        shown += [f"outlier: {item}" for item in self.outliers[:SHOWN]]
        return shown + [f"broken: {problem}" for problem in self.problems]


def sources(found: Sequence[Findings]) -> dict[str, int]:
    """How many records come from each kind and size of file."""
    total: Counter[str] = Counter()
    for findings in found:
        total.update(findings.sources)
    return dict(total.most_common())


def _joined(found: Sequence[Findings], name: str) -> numpy.ndarray:
    return numpy.concatenate([numpy.asarray(vars(findings)[name], dtype=numpy.float32) for findings in found])


def spreads(found: Sequence[Findings]) -> dict[str, Spread]:
    """The spread of each figure over all records."""
    names = {
        "prompt characters": "prompt_lengths",
        "text rows": "text_rows",
        "text rms": "text_rms",
        "first frame rms": "latent_rms",
    }
    made = {}
    for label, name in names.items():
        values = _joined(found, name)
        values = values[numpy.isfinite(values)]
        if len(values):
            made[label] = Spread(*(float(x) for x in (values.min(), numpy.median(values), values.mean(), values.max())))
    return made


def outliers(found: Sequence[Findings]) -> tuple[Outlier, ...]:
    """Records whose first frame or text is further from the median than `FAR`, by the median deviation."""
    owners = [(findings.shard.name, key) for findings in found for key in findings.keys]
    made = []
    for tensor, name in (("first_frame", "latent_rms"), ("text", "text_rms")):
        values = _joined(found, name)
        known = values[numpy.isfinite(values)]
        if not len(known):
            continue
        median = float(numpy.median(known))
        deviation = 1.4826 * float(numpy.median(numpy.abs(known - median)))  # a standard deviation, were they normal
        far = numpy.abs(values - median) > FAR * max(deviation, 0.01 * median)
        made += [Outlier(*owners[i], tensor, float(values[i]), median) for i in numpy.flatnonzero(far)]
    return tuple(made)
