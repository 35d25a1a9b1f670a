"""Writes the metrics of a run on rank 0: `metrics.jsonl`, trackers, warnings and the progress line."""

import logging
import math
import resource
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from common.progress import ProgressBar
from stage2_distill.distributed.process_group import RankContext
from stage2_distill.dmd.latent_stats import LATENT_STATS
from stage2_distill.monitoring.alerts import MetricAlerts
from stage2_distill.monitoring.metrics_log import METRICS_FILE, MetricsLog, StepResult
from stage2_distill.monitoring.trackers import ExperimentTrackers


def metrics_line(iteration: int, step: StepResult, *, seconds: float, memory: float) -> dict[str, float]:
    """The metrics of one iteration by name; trackers group them by the first word of the name."""
    line: dict[str, float] = {"iteration": iteration, "seconds": round(seconds, 4), "memory_gib": round(memory, 3)}
    line |= {f"seconds_{phase}": round(value, 4) for phase, value in step.seconds.items()}
    sampled = step.critic or step.student  # the critic's samples, because it is updated more often
    assert sampled is not None, "an iteration updates a role"
    line |= {f"latent_{name}": value for name, value in zip(LATENT_STATS, sampled.latent_stats, strict=True)}
    for role, update in (("critic", step.critic), ("student", step.student)):
        if update is None:
            continue
        line |= {f"{role}_loss": update.loss, f"{role}_grad_norm": update.grad_norm}
        if update.exit_index is not None:  # losses of different exits differ by orders of magnitude
            line |= {f"{role}_exit": update.exit_index, f"{role}_loss_exit{update.exit_index}": update.loss}
    if step.student is not None and step.critic is not None:  # else its loss is another
        # the loss is half the mean square of (fake - real) / mean|x0 - real|
        line["critic_teacher_gap"] = math.sqrt(2 * step.student.loss)
    return line


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB


class TrainingMonitor(ExitStack):
    """Context that writes each iteration of a run from `start` to `end`; all ranks but rank 0 are silent."""

    def __init__(
        self, out: Path, ranks: RankContext, *, start: int, end: int, wandb: str, options: Mapping[str, object]
    ) -> None:
        super().__init__()
        self.device, self.is_main_rank, self.alerts = ranks.device, ranks.rank == 0, MetricAlerts()
        self.progress = self.enter_context(
            ProgressBar(end, initial=start, label="distill", quiet=not self.is_main_rank)
        )
        if self.is_main_rank:
            self.metrics_log = self.enter_context(closing(MetricsLog(out / METRICS_FILE, start=start)))
            trackers = ExperimentTrackers(out, start=start, wandb=wandb, options=options)
            self.trackers = self.enter_context(closing(trackers))
            for line in self.metrics_log.kept_lines:  # what was warned about before the restart
                self.alerts.check_line(line)
        self.last_write = time.perf_counter()

    def write(self, iteration: int, step: StepResult) -> None:
        """Write one iteration, which has just ended; it took the time since the last call."""
        now = time.perf_counter()
        seconds, self.last_write = now - self.last_write, now
        if not self.is_main_rank:
            return
        line = metrics_line(iteration, step, seconds=seconds, memory=peak_memory_gib(self.device))
        self.metrics_log.write(line)
        self.trackers.write(line)
        losses = [f"{role} {line[f'{role}_loss']:.4f}" for role in ("student", "critic") if f"{role}_loss" in line]
        speed = f"{line['seconds']:.2f} s, data {line.get('seconds_data', 0.0):.2f} s"
        self.progress.advance(f"{' '.join(losses)}, {speed}, {line['memory_gib']:.1f} GiB")
        for warning in self.alerts.check_line(line):
            logging.warning(warning)

    def sync(self) -> None:
        """Flush the metrics to the disk; call it before each checkpoint."""
        if self.is_main_rank:
            self.metrics_log.sync()
