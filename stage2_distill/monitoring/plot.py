"""Draws the curves of a run as one picture, RUN/curves.png, from metrics.jsonl alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stage2_distill.monitoring.alerts import METRIC_BOUNDS
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "curves.png"
FONT_SIZE, LEGEND_COLUMNS = 14, 2  # points
MAX_POINTS = 150  # per curve; longer runs are averaged over windows
Curves = dict[str, tuple[list[float], list[float]]]  # iterations and values by metric
PANELS = {  # title: prefixes of metrics
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
    """Draw the curves of a run; returns the picture's path, ValueError without metrics or without matplotlib."""
    if not (run / METRICS_FILE).is_file():
        raise ValueError(f"run={run}: holds no {METRICS_FILE}; name the folder of a run of distill")
    lines = [line for _, line in complete_lines(run / METRICS_FILE, warn=True)]
    if not lines:
        raise ValueError(f"run={run}: {METRICS_FILE} has no complete line; wait for the first iteration")
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps a global state and may open a window
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed; pip install 'ti2v-distill[plot]'") from error
    # One panel per row and large letters: they can be read on a screen of 390 pixels too.
    figure = Figure(figsize=(7, 4.5 * len(PANELS)), layout="constrained")  # inches
    for index, (title, prefixes) in enumerate(PANELS.items()):
        draw_panel(figure.add_subplot(len(PANELS), 1, index + 1), title, collect_curves(lines, prefixes))
    figure.suptitle(f"{run.resolve().name}: {len(lines)} iterations", fontsize=FONT_SIZE + 2)
    figure.savefig(run / PICTURE_FILE, dpi=110)
    return run / PICTURE_FILE


def collect_curves(lines: Sequence[Mapping[str, float]], prefixes: tuple[str, ...]) -> Curves:
    """Iterations and values of every metric whose name begins with one of `prefixes`, by name."""
    curves = {}
    for name in sorted({name for line in lines for name in line if name.startswith(prefixes)}):
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        curves[name] = average_windows([x for x, _ in points]), average_windows([y for _, y in points])
    return curves


def average_windows(values: Sequence[float]) -> list[float]:
    """At most MAX_POINTS means over neighbours, with windows of equal width except the last."""
    width = -(-len(values) // MAX_POINTS)  # rounded up
    windows = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(window) / len(window) for window in windows]


def draw_panel(axes: "Axes", title: str, curves: Curves) -> None:
    """Draw one panel; dashed lines are the bounds at which a run warns, unless they are far from the curves."""
    for name, (x, y) in curves.items():
        axes.plot(x, y, linewidth=1, marker="." if len(x) < 30 else "", label=name)  # a lone point needs a marker
    values = [value for _, y in curves.values() for value in y]
    limits = [limit for bounds in METRIC_BOUNDS if bounds.metric in curves for limit in (bounds.low, bounds.high)]
    for limit in limits:
        if values and min(values) / 3 <= limit <= 3 * max(values):  # a far one would flatten the curves
            axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1)
    if title in LOG_SCALE_PANELS and values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=FONT_SIZE)
    axes.set_xlabel("iteration", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.grid(alpha=0.3)
    if curves:  # below the panel, where it hides no curve
        axes.legend(fontsize=FONT_SIZE, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=LEGEND_COLUMNS)
