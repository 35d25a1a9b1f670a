"""`plot`: the curves of a run as one picture, RUN/curves.png, from metrics.jsonl alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stage2_distill.alarms import BOUNDS
from stage2_distill.journal import METRICS, whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "curves.png"
POINTS = 150  # of a curve: longer runs are averaged over windows
Lines = Sequence[Mapping[str, float]]
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
LOGARITHMIC = ("Student loss by exit", "Critic loss by exit", "Gradient norms", "Latent temporal variance")


def plot(run: Path) -> Path:
    """Draw the curves of a run; ValueError if it has none or if matplotlib is not installed."""
    if not (run / METRICS).is_file():
        raise ValueError(f"run={run}: holds no {METRICS}; name the folder of a run of distill")
    lines = [line for _, line in whole_lines(run / METRICS)]
    if not lines:
        raise ValueError(f"run={run}: {METRICS} is empty; wait for the first iteration")
    figure = open_figure()
    for place, (title, names) in enumerate(PANELS.items()):
        draw(figure.add_subplot(len(PANELS) // 2, 2, place + 1), title, curves(lines, names))
    figure.suptitle(f"{run.name}: {len(lines)} iterations")
    figure.savefig(run / PICTURE, dpi=100)
    return run / PICTURE


def open_figure() -> "Figure":
    """An empty figure with room for all panels, two per row; ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed; pip install 'ti2v-distill[plot]'") from error
    return Figure(figsize=(13, 4 * (len(PANELS) // 2)), layout="constrained")


def curves(lines: Lines, prefixes: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Iterations and values of every figure whose name begins with one of `prefixes`."""
    names = sorted({name for line in lines for name in line if name.startswith(tuple(prefixes))})
    found = {}
    for name in names:
        points = [(line["iteration"], line[name]) for line in lines if name in line]
        found[name] = thin([x for x, _ in points]), thin([y for _, y in points])
    return found


def thin(values: Sequence[float]) -> list[float]:
    """At most POINTS means of neighbours, all of equal width but the last."""
    width = -(-len(values) // POINTS)
    windows = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(window) / len(window) for window in windows]


def draw(axes: "Axes", title: str, found: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """One panel; dashed lines are the bounds at which a run warns, where they are near."""
    for name, (x, y) in found.items():
        axes.plot(x, y, linewidth=1, marker="." if len(x) < 30 else "", label=name)
    values = [value for _, y in found.values() for value in y]
    for bounds in (bounds for bounds in BOUNDS if bounds.figure in found):
        for limit in (bounds.low, bounds.high):
            if values and min(values) / 3 <= limit <= 3 * max(values):
                axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1)
    if title in LOGARITHMIC and values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)
    if found:
        axes.legend(fontsize=8)
