"""The curves of a run on TensorBoard (RUN/tensorboard) and, if asked for, on Weights & Biases."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER, WANDB_PROJECT = "tensorboard", "ti2v-distill"
INSTALL = "pip install 'ti2v-distill[tensorboard]'"


class WandbRun(Protocol):
    """What is used of a run of W&B."""

    def log(self, data: dict[str, float], step: int) -> None:
        """Add one iteration."""

    def finish(self) -> None:
        """Send what is left."""


class ExperimentTrackers:
    """Writes lines of metrics; a run that goes on from iteration `start` hides what was written after it."""

    def __init__(self, out: Path, *, start: int, wandb: str, options: Mapping[str, object]) -> None:
        self.tensorboard = open_tensorboard(out, start)
        self.wandb = None if wandb == "off" else open_wandb(out, wandb, options)

    def write(self, line: Mapping[str, float]) -> None:
        """Add one iteration; `critic_loss` is the tag critic/loss."""
        step = int(line["iteration"])
        values = {name.replace("_", "/", 1): value for name, value in line.items() if name != "iteration"}
        if self.tensorboard is not None:
            for tag, value in values.items():
                self.tensorboard.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_tensorboard(out: Path, start: int) -> "SummaryWriter | None":
    """Open the event file of this folder; None, with one line in the log, if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logging.warning("tensorboard: not installed, curves go to metrics.jsonl only; %s", INSTALL)
        return None
    return SummaryWriter(str(out / TENSORBOARD_FOLDER), purge_step=start)


def open_wandb(out: Path, wandb_mode: str, options: Mapping[str, object]) -> WandbRun:
    """Start or go on with the run of this folder on W&B; ValueError where the package is not there.

    Entity, project and key come from W&B's own environment variables and login.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb: is not installed; pip install 'ti2v-distill[wandb]', or leave --wandb off") from error
    mode: Literal["offline", "online"] = "offline" if wandb_mode == "offline" else "online"
    name = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    try:
        run: WandbRun = wandb.init(
            project=WANDB_PROJECT,
            id=name,
            name=out.name,
            dir=str(out),
            mode=mode,
            resume="allow",
            config=dict(options),
        )
    except wandb.Error as error:
        raise ValueError(f"wandb={wandb_mode}: {' '.join(str(error).split())}; log in, or leave --wandb off") from error
    return run
