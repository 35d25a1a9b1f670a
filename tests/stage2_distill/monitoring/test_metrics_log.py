"""`metrics.jsonl` through kills and a full disk."""

import json
import resource
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "damage",
    [b"", b"\n", b"{}\n", b"null\n", b"[1]\n", b'{"iteration": "2"}\n', b'{"iteration": 2.5}\n',
     b'{"iteration": true}\n',
     b'{"iteration": 2, "critic_loss": "low"}\n', b'{"iteration": 2, "critic_loss": null}\n', b"\xff\xfe\n", b"\0\0\n",
     b'{"iteration": 2, "critic_lo\n', b"[" * 100_000 + b"\n", b'{"iteration": 2, "critic_loss": {"a": 1}}\n'],
)  # fmt: skip
def test_damaged_lines_are_named_and_left_out(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / METRICS_FILE
    good = [b'{"iteration": %d, "critic_loss": 1.5}\n' % number for number in range(5)]
    path.write_bytes(b"".join([*good[:2], damage, *good[3:]]))
    metrics_log = MetricsLog(path, start=4)
    metrics_log.write({"iteration": 4})
    metrics_log.close()
    assert iterations(tmp_path) == [0, 1, 3, 4]
    assert f"{path}: lacks 1 of 4 iterations, from 2 on" in caplog.messages
    if damage:
        assert f"{path}: line 3 cannot be read; the other lines are used" in caplog.messages


def test_a_missing_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricsLog(tmp_path / METRICS_FILE, start=0).close()
    assert caplog.messages == []
    (tmp_path / METRICS_FILE).unlink()
    MetricsLog(tmp_path / METRICS_FILE, start=7).close()
    assert caplog.messages == [f"{tmp_path / METRICS_FILE}: lacks 7 of 7 iterations, from 0 on"]


def test_numbers_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"iteration": 0, "critic_loss": NaN, "critic_grad_norm": Infinity}\n')
    (line,) = [line for _, line in complete_lines(tmp_path / METRICS_FILE)]
    assert line["critic_grad_norm"] == float("inf")
