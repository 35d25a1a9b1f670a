"""Says once, in plain words, when a figure of the run drifts out of its bounds."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_ITERATIONS = 20  # iterations over which a figure is averaged


@dataclass(frozen=True)
class MetricBounds:
    """Where the mean of a figure should stay, and what it means when it does not."""

    metric: str
    low: float
    high: float
    too_low: str
    too_high: str


METRIC_BOUNDS = (
    MetricBounds(
        "latent_saturation", 0.4, 1.8,
        "the student's videos lose their contrast; lower the learning rates or go back to an earlier checkpoint",
        "the student's videos over-saturate; stop soon, and choose an earlier checkpoint with evaluate --select",
    ),
    MetricBounds(
        "latent_temporal_variance", 0.003, 4.0,
        "the student's videos stand still; lower guidance_scale or add clips with motion",
        "the student's videos flicker; lower the learning rates",
    ),
    MetricBounds(
        "latent_first_frame_distance", 0.0, 1.5,
        "",
        "the student's videos leave their first frame at once; do shards and model belong together?",
    ),
    MetricBounds(
        "critic_teacher_gap", 0.0, 5.0,
        "",
        "the critic is far from the teacher; raise critic_lr or student_every, or give it a critic_warmup",
    ),
    MetricBounds(
        "critic_loss_rise", 0.0, 10.0,
        "",
        "the critic loses the student: its loss is ten times what it was; lower student_lr or raise student_every",
    ),
)  # fmt: skip


class MetricAlerts:
    """Reads a run's lines in order; a pure function of them, so a resumed run neither repeats nor forgets a warning."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW_ITERATIONS))
        self.least_loss = float("inf")
        self.warned: set[str] = set()

    def check_line(self, line: Mapping[str, float]) -> list[str]:
        """Warnings that this line gives rise to, each for the first time in the run."""
        means = self._window_means(line)
        return [
            text
            for bounds in METRIC_BOUNDS
            if bounds.metric in means
            for text in self._check_bounds(bounds, means, line)
        ]

    def _window_means(self, line: Mapping[str, float]) -> dict[str, float]:
        for figure, value in line.items():
            self.recent[figure].append(value)
        means = {
            figure: sum(self.recent[figure]) / WINDOW_ITERATIONS
            for figure in line
            if len(self.recent[figure]) == WINDOW_ITERATIONS
        }
        if "critic_loss" in means:
            self.least_loss = min(self.least_loss, means["critic_loss"])
            means["critic_loss_rise"] = means["critic_loss"] / max(self.least_loss, 1e-30)
        return means

    def _check_bounds(self, bounds: MetricBounds, means: Mapping[str, float], line: Mapping[str, float]) -> list[str]:
        value = means[bounds.metric]
        if bounds.low <= value <= bounds.high or bounds.metric in self.warned:
            return []
        self.warned.add(bounds.metric)
        meaning = bounds.too_low if value < bounds.low else bounds.too_high
        return [
            f"warning: iteration {line['iteration']:.0f}: {bounds.metric} is {value:.3g}, "
            f"outside {bounds.low:g} to {bounds.high:g}: {meaning}"
        ]
