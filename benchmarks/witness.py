"""`cli.py distill` that records what each rank trained on: `-m benchmarks.witness CONFIG [--die ITERATION]`.

OUT/seen-RANK.txt gets one line per sample: iteration, role, index of the sample, digest of first frame and text.
OUT/starts.txt gets the first iteration of every start. With --die the last rank kills itself with signal 9 in that
iteration, once.
"""

import argparse
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from common.condition import Condition
from common.options import resolve_config
from stage2_distill import train
from stage2_distill.config import DistillConfig
from stage2_distill.dmd.rollout import Simulated, StudentRollouts
from stage2_distill.dmd.schedule import MicroBatch
from stage2_distill.monitoring.metrics_log import StepResult
from stage2_distill.trainer import Trainer


def sample_digest(condition: Condition, index: int) -> str:
    """Return a hash of one sample's first frame and text."""
    assert condition.first_frame is not None
    tensors = [tensor[index].float().cpu().contiguous() for tensor in (condition.first_frame, condition.text)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--die", type=int, default=-1)
    options = parser.parse_args()
    config = resolve_config(DistillConfig, {"config": options.config})
    out, simulate, step = Path(config.out), StudentRollouts.simulate, train.train_step
    started: list[int] = []

    def record_rollout(
        rollouts: StudentRollouts, micro_batch: MicroBatch, condition: Condition, exit_index: int
    ) -> Simulated:
        with (out / f"seen-{dist.get_rank()}.txt").open("a") as file:
            for index, sample in enumerate(micro_batch.samples):
                digest = sample_digest(condition, index)
                file.write(f"{micro_batch.iteration} {micro_batch.role} {sample} {digest}\n")
        return simulate(rollouts, micro_batch, condition, exit_index)

    def die_once(trainer: Trainer, iteration: int, data: Iterator[tuple[MicroBatch, Condition]]) -> StepResult:
        killed = out / "killed"
        if not started and trainer.ranks.rank == 0:
            with (out / "starts.txt").open("a") as file:
                file.write(f"{iteration}\n")
        started.append(iteration)
        if iteration == options.die and trainer.ranks.rank == trainer.ranks.world - 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, iteration, data)

    StudentRollouts.simulate, train.train_step = record_rollout, die_once
    train.distill(config)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
