"""Describing a data set: what is in it, and which records stand out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from shards.manifest import Manifest
from shards.verification.check_shard import DataProblem, ShardReport

OUTLIER_DEVIATIONS = 10.0  # robust standard deviations from the median that make an outlier
MAX_PRINTED = 20  # outliers and kinds of sources in a printed report


@dataclass(frozen=True)
class RecordOutlier:
    """A record whose latent or text is much larger or smaller than usual: worth a look, not broken."""

    file: str
    key: str
    tensor: str
    rms: float
    median: float

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.tensor} has an rms of {self.rms:.4g}, the median is {self.median:.4g}"


@dataclass(frozen=True)
class ValueSummary:
    """Lowest, median, mean and highest value."""

    low: float
    median: float
    mean: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}, median {self.median:.4g}, mean {self.mean:.4g}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    location: str
    manifest: Manifest | None  # None = cannot be read
    problems: tuple[DataProblem, ...]
    outliers: tuple[RecordOutlier, ...]
    value_summaries: Mapping[str, ValueSummary]
    sources: Mapping[str, int]  # most frequent first

    def format_lines(self) -> list[str]:
        """The report in words."""
        lines = [f"{self.location}: {len(self.problems)} problems, {len(self.outliers)} outliers"]
        if self.manifest is not None:
            rows = sum(shard.rows for shard in self.manifest.shards)
            lines.append(
                f"{self.manifest.records} records + {self.manifest.failures} failures = {rows} rows"
                f" in {len(self.manifest.shards)} shards; {self.manifest.spec}"
            )
        lines += [f"{name}: {summary}" for name, summary in self.value_summaries.items()]
        lines += [f"{count} records from {kind}" for kind, count in list(self.sources.items())[:MAX_PRINTED]]
        lines += [f"outlier: {item}" for item in self.outliers[:MAX_PRINTED]]
        return lines + [f"broken: {problem}" for problem in self.problems]


def count_sources(shard_reports: Sequence[ShardReport]) -> dict[str, int]:
    """How many records come from each kind and size of file."""
    total: Counter[str] = Counter()
    for shard_report in shard_reports:
        total.update(shard_report.sources)
    return dict(total.most_common())


def _concatenate_values(shard_reports: Sequence[ShardReport], name: str) -> numpy.ndarray:
    return numpy.concatenate(
        [numpy.asarray(vars(shard_report)[name], dtype=numpy.float32) for shard_report in shard_reports]
    )


def summarize_values(shard_reports: Sequence[ShardReport]) -> dict[str, ValueSummary]:
    """The spread of each figure over all records."""
    names = {
        "prompt characters": "prompt_lengths",
        "text rows": "text_rows",
        "text rms": "text_rms",
        "first frame rms": "latent_rms",
    }
    summaries = {}
    for label, name in names.items():
        values = _concatenate_values(shard_reports, name)
        values = values[numpy.isfinite(values)]
        if len(values):
            summaries[label] = ValueSummary(
                *(float(x) for x in (values.min(), numpy.median(values), values.mean(), values.max()))
            )
    return summaries


def find_outliers(shard_reports: Sequence[ShardReport]) -> tuple[RecordOutlier, ...]:
    """Records whose first frame or text is further from the median than `FAR`, by the median deviation."""
    owners = [(shard_report.shard.name, key) for shard_report in shard_reports for key in shard_report.keys]
    result = []
    for tensor, name in (("first_frame", "latent_rms"), ("text", "text_rms")):
        values = _concatenate_values(shard_reports, name)
        finite_values = values[numpy.isfinite(values)]
        if not len(finite_values):
            continue
        median = float(numpy.median(finite_values))
        deviation = 1.4826 * float(
            numpy.median(numpy.abs(finite_values - median))
        )  # a standard deviation, were they normal
        is_outlier = numpy.abs(values - median) > OUTLIER_DEVIATIONS * max(deviation, 0.01 * median)
        result += [RecordOutlier(*owners[i], tensor, float(values[i]), median) for i in numpy.flatnonzero(is_outlier)]
    return tuple(result)
