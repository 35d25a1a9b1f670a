"""The curves of a run as a picture."""

import json
import sys
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from cli import cli
from stage2_distill.monitoring.plot import MAX_POINTS, average_windows, collect_curves, draw_panel, plot_curves


def write_metrics(run: Path, count: int) -> Path:
    run.mkdir()
    lines = []
    for i in range(count):
        line = {"iteration": i, "seconds": 1.0, "seconds_rollout": 0.4, "latent_saturation": 1.0 + i / count}
        line |= {"critic_loss": 0.1, f"critic_loss_exit{i % 4}": 0.1 / (1 + i), "critic_grad_norm": 1.0}
        lines.append(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 9')
    return run


def test_picture_changes_with_the_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["plot", str(write_metrics(tmp_path / "a", 50))])
    assert result.output.strip() == str(tmp_path / "a" / "curves.png")
    first = Image.open(tmp_path / "a" / "curves.png")
    assert first.size == (770, 3960)
    second = Image.open(plot_curves(write_metrics(tmp_path / "b", 51)))
    different = numpy.asarray(first.convert("L")) != numpy.asarray(second.convert("L"))
    assert 0.001 < different.mean() < 0.2
    colours = {tuple(colour) for colour in numpy.asarray(first.convert("RGB")).reshape(-1, 3)[::7]}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours, "a line for each exit"


def test_curves_are_the_metrics_by_name() -> None:
    lines = [{"iteration": i, f"critic_loss_exit{i % 2}": float(i)} for i in range(6)]
    assert collect_curves(lines, ("critic_loss_exit",)) == {
        "critic_loss_exit0": ([0, 2, 4], [0, 2, 4]),
        "critic_loss_exit1": ([1, 3, 5], [1, 3, 5]),
    }


def test_long_runs_are_averaged() -> None:
    assert average_windows(list(range(MAX_POINTS))) == list(range(MAX_POINTS))
    assert average_windows(list(range(2 * MAX_POINTS)))[:3] == [0.5, 2.5, 4.5]
    assert len(average_windows(list(range(2 * MAX_POINTS + 1)))) <= MAX_POINTS


def test_missing_matplotlib_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write_metrics(tmp_path / "run", 3)
    with pytest.raises(ValueError, match=r"^plot: matplotlib is not installed; pip install 'ti2v-distill\[plot\]'$"):
        plot_curves(run)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no metrics.jsonl"), ("", "has no complete line"), ("{\n[]\n", "has no complete line")],
)
def test_no_curves_no_picture(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        plot_curves(tmp_path)


def test_damaged_lines_are_left_out_of_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_metrics(tmp_path / "run", 5)
    path = run / "metrics.jsonl"
    path.write_text('{"iteration": 1, "seconds": "x"}\nnull\n' + path.read_text())
    assert plot_curves(run).is_file()
    assert caplog.messages == [f"{path}: line 1, 2, 8 cannot be read; the other lines are used"]


def test_letters_can_be_read_on_a_narrow_screen() -> None:
    """The smallest letters, of 14 points at 110 dots per inch, are 21 pixels of a picture 770 wide: 11 of 390."""
    axes = Figure(figsize=(7, 4.5)).add_subplot()
    draw_panel(axes, "Gradient norms", {"student_grad_norm": ([0.0, 1.0], [1.0, 2.0])})
    texts = [*axes.get_legend().get_texts(), *axes.get_xticklabels(), axes.xaxis.label, axes.title]
    assert min(text.get_fontsize() for text in texts) / 72 * 110 * 390 / 770 > 10
