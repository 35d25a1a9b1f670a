"""`metrics.jsonl`: exactly one line per iteration, also after any number of restarts."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import write_file

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
    critic: UpdateResult
    seconds: dict[str, float]  # by phase


def complete_lines(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    """The lines of a `metrics.jsonl`, raw and parsed, without one that a killed run left unfinished."""
    raw_lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(raw, json.loads(raw)) for raw in raw_lines if raw.endswith(b"\n")]


class MetricsLog:
    """Appends to `metrics.jsonl`; on opening, the lines of iterations from `start` on, which run again, are removed."""

    def __init__(self, path: Path, *, start: int) -> None:
        kept_lines = [(raw, line) for raw, line in complete_lines(path) if line["iteration"] < start]
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
