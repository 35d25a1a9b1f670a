"""Draws the curves of a run as one picture, RUN/curves.png, from metrics.jsonl alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stage2_distill.monitoring.alerts import METRIC_BOUNDS
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_FILE = "curves.png"
MAX_POINTS = 150  # of a curve: longer runs are averaged over windows
MetricLines = Sequence[Mapping[str, float]]
PANELS = {
    "Student loss by exit": ("student_loss_exit",),
    "Critic loss by exit": ("critic_loss_exit",),
    "Gradient norms": ("student_grad_norm", "critic_grad_norm"),
    "Critic against teacher": ("critic_teacher_gap",),
    "Latent saturation": ("latent_saturation",),
    "Latent temporal variance": ("latent_temporal_variance",),
    "Distance to the first frame": ("latent_first_frame_distance",),
    "Seconds by phase": ("seconds",),
}
LOG_SCALE_PANELS = ("Student loss by exit", "Critic loss by exit", "Gradient norms", "Latent temporal variance")


def plot_curves(run: Path) -> Path:
    """Draw the curves of a run; ValueError if it has none or if matplotlib is not installed."""
    if not (run / METRICS_FILE).is_file():
        raise ValueError(f"run={run}: holds no {METRICS_FILE}; name the folder of a run of distill")
    lines = [line for _, line in complete_lines(run / METRICS_FILE)]
    if not lines:
        raise ValueError(f"run={run}: {METRICS_FILE} is empty; wait for the first iteration")
    figure = open_figure()
    for index, (title, names) in enumerate(PANELS.items()):
        draw_panel(figure.add_subplot(len(PANELS) // 2, 2, index + 1), title, collect_curves(lines, names))
    figure.suptitle(f"{run.name}: {len(lines)} iterations")
    figure.savefig(run / PICTURE_FILE, dpi=100)
    return run / PICTURE_FILE


def open_figure() -> "Figure":
    """An empty figure with room for all panels, two per row; ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed; pip install 'ti2v-distill[plot]'") from error
    return Figure(figsize=(13, 4 * (len(PANELS) // 2)), layout="constrained")


def collect_curves(lines: MetricLines, prefixes: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Iterations and values of every figure whose name begins with one of `prefixes`."""
    names = sorted({name for line in lines for name in line if name.startswith(tuple(prefixes))})
    collected = {}
    for name in names:
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        collected[name] = average_windows([x for x, _ in points]), average_windows([y for _, y in points])
    return collected


def average_windows(values: Sequence[float]) -> list[float]:
    """At most MAX_POINTS means of neighbours, all of equal width but the last."""
    width = -(-len(values) // MAX_POINTS)
    windows = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(window) / len(window) for window in windows]


def draw_panel(axes: "Axes", title: str, panel_curves: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """One panel; dashed lines are the bounds at which a run warns, where they are near."""
    for name, (x, y) in panel_curves.items():
        axes.plot(x, y, linewidth=1, marker="." if len(x) < 30 else "", label=name)
    values = [value for _, y in panel_curves.values() for value in y]
    for bounds in (bounds for bounds in METRIC_BOUNDS if bounds.metric in panel_curves):
        for limit in (bounds.low, bounds.high):
            if values and min(values) / 3 <= limit <= 3 * max(values):
                axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1)
    if title in LOG_SCALE_PANELS and values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if panel_curves:
        axes.legend(fontsize=8)
