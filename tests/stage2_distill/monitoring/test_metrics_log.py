"""`metrics.jsonl` through kills and a full disk."""

import json
import resource
from pathlib import Path

from stage2_distill.monitoring.metrics_log import METRICS_FILE, MetricsLog, complete_lines


def iterations(run: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_opening_drops_lines_that_run_again_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"iteration": {n}}}\n' for n in range(5)) + '{"itera')
    metrics_log = MetricsLog(path, start=3)
    metrics_log.write({"iteration": 3})
    metrics_log.close()
    assert iterations(tmp_path) == [0, 1, 2, 3]


def test_lines_wait_for_disk_space(tmp_path: Path) -> None:
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl", start=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, old_limit[1]))  # the second line fits in part
    try:
        for iteration in range(3):
            metrics_log.write({"iteration": iteration})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    metrics_log.write({"iteration": 3})
    metrics_log.close()
    assert iterations(tmp_path) == [0, 1, 2, 3]


def test_torn_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 0, "critic_loss": 1.0}\n{"iteration": 1, "cri')
    assert [line for _, line in complete_lines(tmp_path / METRICS_FILE)] == [{"iteration": 0, "critic_loss": 1.0}]
