"""`metrics.jsonl`: exactly one line per iteration, also after any number of restarts."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import read_file, write_file

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class UpdateResult:
    """Result of one update of one role, on the CPU."""

    loss: float
    grad_norm: float
    exit_index: int | None  # None if the micro-batches left the rollout at different steps
    latent_stats: tuple[float, ...]  # of the rollout, in the order of LATENT_STATS


@dataclass(frozen=True)
class StepResult:
    """Result of one iteration."""

    student: UpdateResult | None  # None if only the critic was updated
    critic: UpdateResult | None  # None if only the student was updated
    seconds: dict[str, float]  # by phase


def complete_lines(path: Path, *, warn: bool = False) -> list[tuple[bytes, dict[str, float]]]:
    """The lines of a `metrics.jsonl`, raw and parsed, without cut and damaged ones, which `warn` names in the log."""
    raw_lines = read_file(path).splitlines(keepends=True) if path.exists() else []
    parsed = [(raw, parse_line(raw)) for raw in raw_lines]
    damaged = [str(number) for number, (_, line) in enumerate(parsed, 1) if line is None]
    if damaged and warn:
        logging.warning("%s: line %s cannot be read; the other lines are used", path, ", ".join(damaged[:5]))
    return [(raw, line) for raw, line in parsed if line is not None]


def parse_line(raw: bytes) -> dict[str, float] | None:
    """The metrics of one iteration; None for half a line of a killed run, and for anything else."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("iteration")) is not int:
        return None
    return line if all(type(value) in (int, float) for value in line.values()) else None  # bool is no number


class MetricsLog:
    """Appends to `metrics.jsonl`; on opening, the lines of iterations from `start` on, which run again, are removed."""

    def __init__(self, path: Path, *, start: int) -> None:
        kept_lines = [(raw, line) for raw, line in complete_lines(path, warn=True) if line["iteration"] < start]
        missing = sorted(set(range(start)) - {int(line["iteration"]) for _, line in kept_lines})
        if missing:
            logging.warning("%s: lacks %d of %d iterations, from %d on", path, len(missing), start, missing[0])
        write_file(path, b"".join(raw for raw, _ in kept_lines))
        self.kept_lines = [line for _, line in kept_lines]
        # unbuffered: a full disk must show in `write`, and a killed process must lose no line
        self.path, self.file, self.unwritten = path, path.open("ab", buffering=0), b""

    def write(self, line: Mapping[str, float]) -> None:
        """Append one iteration; on a full disk the rest waits for the next call."""
        new = (json.dumps(line) + "\n").encode()
        self.unwritten += new
        try:
            while self.unwritten:  # a raw file may take only a part
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if len(self.unwritten) <= len(new):  # the first line that fails; later ones would repeat the warning
                logging.warning("%s: %s; lines are kept in memory until there is space", self.path, error)

    def sync(self) -> None:
        """Flush to the disk: after a power cut, a checkpoint that is newer than its metrics would leave a gap."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()
