"""`metrics.jsonl`: one line an iteration, without gaps or doubles however often a run is stopped."""

import json
from pathlib import Path

from shards.manifest import write_file
from stage2_distill.train import Step, Update


class Journal:
    """Appends to `metrics.jsonl`; opening it drops the lines of iterations that will run again."""

    def __init__(self, path: Path, *, start: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["iteration"] < start]
        write_file(path, b"".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, step: Step, seconds: float) -> None:
        """Append one iteration."""
        line: dict[str, float] = {"iteration": iteration, "seconds": round(seconds, 4)}
        line |= _numbers("critic", step.critic)
        if step.student is not None:
            line |= _numbers("student", step.student)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _numbers(role: str, update: Update) -> dict[str, float]:
    return {
        f"{role}_loss": update.loss.item(),
        f"{role}_grad_norm": update.grad_norm.item(),
        f"{role}_exit": update.exit_index,
    }
