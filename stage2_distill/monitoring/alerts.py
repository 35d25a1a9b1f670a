"""Warns once, in plain words, when a metric of the run leaves its bounds."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_ITERATIONS = 20  # iterations over which a metric is averaged: a single outlier is no drift


@dataclass(frozen=True)
class MetricBounds:
    """Bounds for the mean of a metric, and what to do if it leaves them."""

    metric: str
    low: float
    high: float
    too_low: str
    too_high: str


# Rules of thumb; latents are normalized, so videos of ordinary contrast have a saturation of 1.
METRIC_BOUNDS = (
    MetricBounds(
        "latent_saturation", 0.4, 1.8,
        "the student's videos lose their contrast; lower student_lr and critic_lr or go back to an earlier checkpoint",
        "the student's videos over-saturate; raise guidance_rescale or lower guidance_scale and student_lr, and "
        "choose an earlier checkpoint with evaluate --select",
    ),
    MetricBounds(
        "latent_temporal_variance", 0.003, 4.0,
        "the student's videos stand still; lower guidance_scale, raise temporal_variance_weight or add clips with "
        "motion",
        "the student's videos flicker; lower student_lr and critic_lr",
    ),
    MetricBounds(
        "latent_first_frame_distance", 0.0, 1.5, "",  # a distance is never too low
        "the student's videos leave their first frame at once; check that shards and model belong together",
    ),
    MetricBounds(
        "critic_teacher_gap", 0.0, 5.0, "",
        "the critic is far from the teacher; raise critic_lr or student_update_interval, or set critic_warmup",
    ),
    MetricBounds(
        "critic_loss_rise", 0.0, 10.0, "",
        "the critic no longer tracks the student: its loss grew tenfold; lower student_lr or raise "
        "student_update_interval",
    ),
)  # fmt: skip


class MetricAlerts:
    """Reads the lines of a run in order; depends on nothing else, so a resumed run neither repeats nor forgets."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW_ITERATIONS))
        self.lowest_critic_loss = float("inf")  # of the means
        self.warned: set[str] = set()

    def check_line(self, line: Mapping[str, float]) -> list[str]:
        """Warnings for the metrics that this line moves out of their bounds for the first time in the run."""
        means, warnings = self._window_means(line), []
        for bounds in METRIC_BOUNDS:
            value = means.get(bounds.metric, bounds.low)
            if bounds.metric not in self.warned and not bounds.low <= value <= bounds.high:
                self.warned.add(bounds.metric)
                warnings.append(
                    f"warning: iteration {line['iteration']:.0f}: {bounds.metric} is {value:.3g}, outside "
                    f"{bounds.low:g} to {bounds.high:g}: {bounds.too_low if value < bounds.low else bounds.too_high}"
                )
        return warnings

    def _window_means(self, line: Mapping[str, float]) -> dict[str, float]:
        for metric, value in line.items():
            self.recent[metric].append(value)
        full_windows = {metric: self.recent[metric] for metric in line if len(self.recent[metric]) == WINDOW_ITERATIONS}
        means = {metric: sum(window) / WINDOW_ITERATIONS for metric, window in full_windows.items()}
        if "critic_loss" in means:
            self.lowest_critic_loss = min(self.lowest_critic_loss, means["critic_loss"])
            means["critic_loss_rise"] = means["critic_loss"] / max(self.lowest_critic_loss, 1e-30)  # 0 / 0 is no rise
        return means
