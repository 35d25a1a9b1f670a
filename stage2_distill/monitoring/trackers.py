"""Sends the metrics of a run to TensorBoard (RUN/tensorboard) and, on request, to Weights & Biases.

A tracker that fails is dropped with one line: metrics.jsonl has everything, and training goes on.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb

TENSORBOARD_FOLDER, WANDB_PROJECT = "tensorboard", "ti2v-distill"
TENSORBOARD_INSTALL = "pip install 'ti2v-distill[tensorboard]'"
FAILURES = (OSError, RuntimeError, ValueError)  # of a full disk, a lost network, a folder that cannot be written


@dataclass(frozen=True)
class Tracker:
    """One open tracker."""

    name: str
    log: Callable[[Mapping[str, float], int], object]  # values by tag, and the iteration
    close: Callable[[], object]
    failures: tuple[type[Exception], ...] = FAILURES


class ExperimentTrackers:
    """Sends lines of metrics; on resume, TensorBoard entries of iterations from `start` on are purged."""

    def __init__(self, out: Path, *, start: int, wandb: str, options: Mapping[str, object]) -> None:
        opened = [open_tensorboard(out, start), None if wandb == "off" else open_wandb(out, wandb, options)]
        self.trackers = [tracker for tracker in opened if tracker is not None]

    def write(self, line: Mapping[str, float]) -> None:
        """Add one iteration; the metric `critic_loss` has the tag `critic/loss`."""
        step = int(line["iteration"])
        values = {name.replace("_", "/", 1): value for name, value in line.items() if name != "iteration"}
        for tracker in list(self.trackers):
            try:
                tracker.log(values, step)
            except tracker.failures as error:
                self.trackers.remove(tracker)
                warn_of_failure(tracker.name, error)

    def close(self) -> None:
        """Flush and close all."""
        for tracker in self.trackers:
            try:
                tracker.close()
            except tracker.failures as error:
                warn_of_failure(tracker.name, error)


def warn_of_failure(name: str, error: Exception) -> None:
    """Say in one line that a tracker failed."""
    reason = " ".join(str(error).split()) or type(error).__name__
    logging.warning("%s: failed (%s); metrics.jsonl goes on, %s has no more of this run", name, reason, name)


def open_tensorboard(out: Path, start: int) -> Tracker | None:
    """Open the event file of a run's folder; None, with one line in the log, if that is not possible."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logging.warning("tensorboard: not installed, curves go to metrics.jsonl only; %s", TENSORBOARD_INSTALL)
        return None
    try:
        writer = SummaryWriter(str(out / TENSORBOARD_FOLDER), purge_step=start)  # hides what will run again
    except FAILURES as error:
        warn_of_failure("tensorboard", error)
        return None

    def log(values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)

    return Tracker("tensorboard", log, writer.close)


def open_wandb(out: Path, mode: str, options: Mapping[str, object]) -> Tracker | None:
    """Start or resume the W&B run of a run's folder, offline if W&B cannot be reached; None if that fails too.

    W&B reads entity, project and API key from its own environment variables and login. ValueError if wandb is not
    installed, or if it has no login.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb: is not installed; pip install 'ti2v-distill[wandb]', or leave --wandb off") from error
    # derived from the path, so that a resumed run finds its own entry; names of folders alone are not unique
    run_id = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    failures = (wandb.Error, *FAILURES)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(
                project=WANDB_PROJECT, id=run_id, name=out.name, dir=str(out),
                mode=attempt, resume="allow", config=dict(options),
            )  # fmt: skip
        except failures as error:
            reason = " ".join(str(error).split())
            if "api_key" in reason or "login" in reason:  # a mistake to correct before the first iteration
                raise ValueError(f"wandb={mode}: {reason}; log in, or leave --wandb off") from error
            logging.warning("wandb: cannot start %s (%s); `wandb sync` sends what is kept offline", attempt, reason)
        else:
            return Tracker("wandb", partial(log_to_wandb, run), run.finish, failures)
    return None


def log_to_wandb(run: "wandb.Run", values: Mapping[str, float], step: int) -> None:
    """Add the values of one iteration."""
    run.log(dict(values), step=step)
