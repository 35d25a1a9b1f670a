"""The benchmarks of the trainer run at tiny size: alone in both memory modes, on two ranks, and the network's."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import knob_costs, loading, network, train_step
from benchmarks.device import covered_time, merge_spans
from tests.forked import run_python


def run_on_two_ranks(*command: str) -> str:
    done = run_python(*command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a benchmark at tiny size in this process, which has imported everything, and returns what it prints."""

    def run(benchmark: ModuleType, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, "--tiny", *options])
        benchmark.main()
        return capsys.readouterr().out

    return run


def test_train_step(run_here: Callable[..., str]) -> None:
    check_train_step(run_here(train_step, "--memory", "compact", "--count", "10"))


def test_train_step_on_two_ranks() -> None:
    options = ("--tiny", "--memory", "standard", "--count", "10")
    check_train_step(run_on_two_ranks("-m", "benchmarks.train_step", *options))


def check_train_step(text: str) -> None:
    for row in (
        "mean iteration: ",
        "phases of a mean iteration: ",
        "rollout reuse, mean iteration: ",
        "host waits in an iteration of two updates: ",
        "pause of a checkpoint: ",
        "forward + backward: ",
    ):
        assert f"\n{row}" in text
    assert text.count("losses finite: True, 12 updates") == 2


def test_adapters_with_inputs_in_host_memory(run_here: Callable[..., str]) -> None:
    options = ("--memory", "standard", "--lora", "4", "--keep", "offload", "--only", "updates")
    assert "\nmean iteration: " in run_here(train_step, *options)


def test_modes_on_two_ranks() -> None:
    text = run_on_two_ranks("-m", "benchmarks.modes", "--tiny", "--modes", "alone,compact,hsdp,checkpoint")
    alone = float(re.search(r"\nalone, mean iteration: ([\d.]+)", text)[1])
    for mode, kind in (("compact", "all_gather"), ("hsdp", "all_reduce")):
        assert re.search(rf"\n{mode}, critic update of 2 ranks, communication: 0\.\d+ s of .*gloo:{kind}", text)
        mean, rate = (float(re.search(rf"\n{mode}, {name}: ([\d.]+)", text)[1]) for name in (
            "mean iteration", "rate of a GPU against one that trains alone"
        ))  # fmt: skip
        assert rate == pytest.approx(alone / mean, rel=0.1)
    assert "\ncheckpoint, pause of a checkpoint: " in text


def test_time_in_overlapping_spans() -> None:
    assert merge_spans([(5, 6), (0, 2), (1, 3), (2, 2.5)]) == [(0, 3), (5, 6)]
    assert covered_time([(5, 6), (0, 2), (1, 3)]) == 4


def test_network(run_here: Callable[..., str], tmp_path: Path) -> None:
    text = run_here(network, "--out", str(tmp_path))
    assert "ours, keep attention" in text
    assert (tmp_path / "backward.txt").stat().st_size > 0


def test_loading(run_here: Callable[..., str]) -> None:
    assert "three roles opened: " in run_here(loading)


def test_costs_of_knobs(run_here: Callable[..., str]) -> None:
    rows = [line.split("  ") for line in run_here(knob_costs).splitlines()]
    assert [row[0] for row in rows] == [*knob_costs.KNOBS, knob_costs.AVERAGE]
    assert rows[0][4] == "1.000"
    critics = {row[0]: row[2] for row in rows}
    assert critics["teacher_warmup, while it lasts"] == "0.00"  # no critic


def test_a_mean_iteration_has_a_share_of_the_students_update() -> None:
    assert knob_costs.KnobCost(student=10.0, critic=3.0, peak=1.0).iteration(5) == 5.0
    assert knob_costs.KnobCost(student=10.0, critic=0.0, peak=1.0).iteration(5) == 10.0
