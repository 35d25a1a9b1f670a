"""`metrics.jsonl`: one line an iteration, without gaps or doubles however often a run is stopped."""

import json
from collections.abc import Mapping
from pathlib import Path

from shards.manifest import write_file

METRICS = "metrics.jsonl"


class Journal:
    """Appends to `metrics.jsonl`; opening it drops the lines of iterations that will run again, and keeps `lines`."""

    def __init__(self, path: Path, *, start: int) -> None:
        written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        read = [(raw, json.loads(raw)) for raw in written if raw.endswith(b"\n")]
        kept = [(raw, line) for raw, line in read if line["iteration"] < start]
        write_file(path, b"".join(raw for raw, _ in kept))
        self.lines: list[dict[str, float]] = [line for _, line in kept]
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, float]) -> None:
        """Append one iteration."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
