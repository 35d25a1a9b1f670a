"""Statistics of a data set, and the records that stand out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy

from common.video import FrameSize
from shards.manifest import Manifest
from shards.verification.check_shard import STATISTICS, DataProblem, ShardReport

OUTLIER_DEVIATIONS = 10.0  # robust standard deviations from the median
MAX_PRINTED = 20  # outliers and kinds of sources in a printed report


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
    """The result of `verify`."""

    location: str
    manifest: Manifest | None  # None = cannot be read
    problems: tuple[DataProblem, ...]
    outliers: tuple[DataProblem, ...] = ()  # much larger or smaller than usual: suspicious, but not broken
    value_summaries: Mapping[str, ValueSummary] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)  # records by kind of source, most frequent first
    notes: Mapping[str, int] = field(default_factory=dict)  # records by what `encode` noted, such as black first frames

    def for_json(self) -> dict[str, object]:
        """The report as plain values, with every outlier and problem."""
        fields = asdict(replace(self, manifest=None))
        if self.manifest is not None:
            counts = {"records": self.manifest.records, "failures": self.manifest.failures}
            fields |= {"shards": len(self.manifest.shards), **counts, "spec": asdict(self.manifest.spec)}
            if self.size_counts:
                fields["sizes"] = [asdict(size) | {"records": count} for size, count in self.size_counts.items()]
        return {name: value for name, value in fields.items() if name != "manifest"}

    @property
    def size_counts(self) -> dict[FrameSize, int]:
        """Records of each size, in the order of sizes; none if the data set has only that of its manifest."""
        counts = Counter[FrameSize]()
        for shard in self.manifest.shards if self.manifest is not None else ():
            if shard.records and shard.video_size:
                counts[FrameSize(*shard.video_size)] += shard.records
        return dict(sorted(counts.items()))

    def format_lines(self) -> list[str]:
        """The report in words."""
        lines = [f"{self.location}: {len(self.problems)} problems, {len(self.outliers)} outliers"]
        if self.manifest is not None:
            shards, counts = self.manifest.shards, (self.manifest.records, self.manifest.failures)
            rows = f"{counts[0]} records + {counts[1]} failures = {sum(shard.rows for shard in shards)} rows"
            spec = self.manifest.spec
            size = f"{spec.num_frames} x {spec.height} x {spec.width} at {spec.fps} frames per second"
            lines.append(f"{rows} in {len(shards)} shards; {size}")
            lines += [f"{count} records of {size} (height x width)" for size, count in self.size_counts.items()]
        lines += [f"{name}: {summary}" for name, summary in self.value_summaries.items()]
        lines += [f"{count} records from {kind}" for kind, count in list(self.sources.items())[:MAX_PRINTED]]
        lines += [f"{count} records: {note}" for note, count in self.notes.items()]
        lines += [f"outlier: {item}" for item in self.outliers[:MAX_PRINTED]]
        return lines + [f"broken: {problem}" for problem in self.problems]


def collect_values(shard_reports: Sequence[ShardReport]) -> dict[str, numpy.ndarray]:
    """Each of `STATISTICS` for all records (N) float32, in the order of the shards."""
    return {name: numpy.concatenate([report.values[name] for report in shard_reports]) for name in STATISTICS}


def summarize_values(values: Mapping[str, numpy.ndarray]) -> dict[str, ValueSummary]:
    """The spread of each statistic over the records that have it."""
    summaries = {}
    for name, of_records in values.items():
        present = of_records[numpy.isfinite(of_records)]
        if len(present):
            figures = present.min(), numpy.median(present), present.mean(), present.max()
            summaries[name] = ValueSummary(*map(float, figures))
    return summaries


def find_outliers(shard_reports: Sequence[ShardReport], values: Mapping[str, numpy.ndarray]) -> tuple[DataProblem, ...]:
    """Records whose first frame or text is more than `OUTLIER_DEVIATIONS` from the median."""
    owners = [(report.shard.name, key) for report in shard_reports for key in report.keys]
    outliers = []
    for tensor, rms in (("first_frame", values["first frame rms"]), ("text", values["text rms"])):
        present = rms[numpy.isfinite(rms)]
        if len(present):
            median = float(numpy.median(present))
            # The median deviation of a normal distribution is 1 / 1.4826 of its standard deviation.
            deviation = max(1.4826 * float(numpy.median(numpy.abs(present - median))), 0.01 * median)
            for i in numpy.flatnonzero(numpy.abs(rms - median) > OUTLIER_DEVIATIONS * deviation):  # never a nan
                reason = f"{tensor} has an rms of {rms[i]:.4g}, the median is {median:.4g}"
                outliers.append(DataProblem(*owners[i], reason))
    return tuple(outliers)
