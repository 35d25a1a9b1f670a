"""`metrics.jsonl`: one line an iteration, without gaps or doubles however often a run is stopped."""

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
    """What one update of one role gives, read from the device."""

    loss: float
    grad_norm: float
    exit_index: int | None  # None: its micro-batches left the rollout at several steps
    latent_stats: tuple[float, ...]  # of the rollout, as latent_stats.LOOKS


@dataclass(frozen=True)
class StepResult:
    """What one iteration gives."""

    student: UpdateResult | None
    critic: UpdateResult
    seconds: dict[str, float]  # by phase


def complete_lines(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    """The lines of a `metrics.jsonl`, raw and read; one that a kill cut short is left out."""
    written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(raw, json.loads(raw)) for raw in written if raw.endswith(b"\n")]


class MetricsLog:
    """Appends to `metrics.jsonl`; opening it drops the lines of iterations that will run again, and keeps `lines`."""

    def __init__(self, path: Path, *, start: int) -> None:
        kept_lines = [(raw, line) for raw, line in complete_lines(path) if line["iteration"] < start]
        write_file(path, b"".join(raw for raw, _ in kept_lines))
        self.lines: list[dict[str, float]] = [line for _, line in kept_lines]
        self.path, self.file, self.unwritten = path, path.open("ab", buffering=0), b""

    def write(self, line: Mapping[str, float]) -> None:
        """Append one iteration; what a full disk does not take waits for the next."""
        new = (json.dumps(line) + "\n").encode()
        self.unwritten += new
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if len(self.unwritten) <= len(new):
                logging.warning("%s: %s; lines wait until there is room", self.path, error)

    def sync(self) -> None:
        """Make what is written outlast a power cut; a checkpoint that is newer than its metrics would leave a gap."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()
