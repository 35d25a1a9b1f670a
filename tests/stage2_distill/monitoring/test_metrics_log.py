"""`metrics.jsonl` through kills and a full disk."""

import json
import resource
from pathlib import Path

from stage2_distill.monitoring.metrics_log import METRICS_FILE, MetricsLog, complete_lines


def iterations(run: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_opening_metrics_drops_what_will_run_again_and_what_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"iteration": {n}}}\n' for n in range(5)) + '{"itera')
    journal = MetricsLog(path, start=3)
    journal.write({"iteration": 3})
    journal.close()
    assert iterations(tmp_path) == [0, 1, 2, 3]


def test_metrics_wait_for_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = MetricsLog(tmp_path / "metrics.jsonl", start=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, before[1]))  # the second line fits in part
    try:
        for iteration in range(3):
            journal.write({"iteration": iteration})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.write({"iteration": 3})
    journal.close()
    assert iterations(tmp_path) == [0, 1, 2, 3]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 0, "critic_loss": 1.0}\n{"iteration": 1, "cri')
    assert [line for _, line in complete_lines(tmp_path / METRICS_FILE)] == [{"iteration": 0, "critic_loss": 1.0}]
