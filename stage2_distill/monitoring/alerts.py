"""Says once, in plain words, when a figure of the run drifts out of its bounds."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 20  # iterations over which a figure is averaged


@dataclass(frozen=True)
class Bounds:
    """Where the mean of a figure should stay, and what it means when it does not."""

    figure: str
    low: float
    high: float
    too_low: str
    too_high: str


BOUNDS = (
    Bounds(
        "latent_saturation", 0.4, 1.8,
        "the student's videos lose their contrast; lower the learning rates or go back to an earlier checkpoint",
        "the student's videos over-saturate; stop soon, and choose an earlier checkpoint with evaluate --select",
    ),
    Bounds(
        "latent_temporal_variance", 0.003, 4.0,
        "the student's videos stand still; lower guidance_scale or add clips with motion",
        "the student's videos flicker; lower the learning rates",
    ),
    Bounds(
        "latent_first_frame_distance", 0.0, 1.5,
        "",
        "the student's videos leave their first frame at once; do shards and model belong together?",
    ),
    Bounds(
        "critic_teacher_gap", 0.0, 5.0,
        "",
        "the critic is far from the teacher; raise critic_lr or student_every, or give it a critic_warmup",
    ),
    Bounds(
        "critic_loss_rise", 0.0, 10.0,
        "",
        "the critic loses the student: its loss is ten times what it was; lower student_lr or raise student_every",
    ),
)  # fmt: skip


class Alarms:
    """Reads a run's lines in order; a pure function of them, so a resumed run neither repeats nor forgets a warning."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self.least_loss = float("inf")
        self.said: set[str] = set()

    def feed(self, line: Mapping[str, float]) -> list[str]:
        """Warnings that this line gives rise to, each for the first time in the run."""
        means = self._means(line)
        return [text for bounds in BOUNDS if bounds.figure in means for text in self._judge(bounds, means, line)]

    def _means(self, line: Mapping[str, float]) -> dict[str, float]:
        for figure, value in line.items():
            self.recent[figure].append(value)
        means = {figure: sum(self.recent[figure]) / WINDOW for figure in line if len(self.recent[figure]) == WINDOW}
        if "critic_loss" in means:
            self.least_loss = min(self.least_loss, means["critic_loss"])
            means["critic_loss_rise"] = means["critic_loss"] / max(self.least_loss, 1e-30)
        return means

    def _judge(self, bounds: Bounds, means: Mapping[str, float], line: Mapping[str, float]) -> list[str]:
        value = means[bounds.figure]
        if bounds.low <= value <= bounds.high or bounds.figure in self.said:
            return []
        self.said.add(bounds.figure)
        words = bounds.too_low if value < bounds.low else bounds.too_high
        return [
            f"warning: iteration {line['iteration']:.0f}: {bounds.figure} is {value:.3g}, "
            f"outside {bounds.low:g} to {bounds.high:g}: {words}"
        ]
