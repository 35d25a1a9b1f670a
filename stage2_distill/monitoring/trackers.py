"""Sends the metrics of a run to TensorBoard (RUN/tensorboard) and, on request, to Weights & Biases."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER, WANDB_PROJECT = "tensorboard", "ti2v-distill"
TENSORBOARD_INSTALL = "pip install 'ti2v-distill[tensorboard]'"


class ExperimentTrackers:
    """Sends lines of metrics; on resume, TensorBoard entries of iterations from `start` on are purged."""

    def __init__(self, out: Path, *, start: int, wandb: str, options: Mapping[str, object]) -> None:
        self.tensorboard = open_tensorboard(out, start)
        self.wandb = None if wandb == "off" else open_wandb(out, wandb, options)

    def write(self, line: Mapping[str, float]) -> None:
        """Add one iteration; the metric `critic_loss` has the tag `critic/loss`."""
        step = int(line["iteration"])
        values = {name.replace("_", "/", 1): value for name, value in line.items() if name != "iteration"}
        if self.tensorboard is not None:
            for tag, value in values.items():
                self.tensorboard.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close both."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_tensorboard(out: Path, start: int) -> "SummaryWriter | None":
    """Open the event file of a run's folder; None, with one line in the log, if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logging.warning("tensorboard: not installed, curves go to metrics.jsonl only; %s", TENSORBOARD_INSTALL)
        return None
    return SummaryWriter(str(out / TENSORBOARD_FOLDER), purge_step=start)  # hides what will run again


def open_wandb(out: Path, mode: str, options: Mapping[str, object]) -> "wandb.Run":
    """Start or resume the W&B run of a run's folder; ValueError if wandb is not installed or refuses.

    W&B reads entity, project and API key from its own environment variables and login.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb: is not installed; pip install 'ti2v-distill[wandb]', or leave --wandb off") from error
    # derived from the path, so that a resumed run finds its own entry; names of folders alone are not unique
    run_id = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    try:
        return wandb.init(
            project=WANDB_PROJECT, id=run_id, name=out.name, dir=str(out),
            mode=mode, resume="allow", config=dict(options),
        )  # fmt: skip
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"wandb={mode}: {reason}; log in, or leave --wandb off") from error
