"""Take one part of the algorithm away and distil again: `evaluate` must then find the student worse.

`python -m benchmarks.ablations critic|pin -- <options of distill>` trains without that part:
    critic  the fake score is the teacher's own, as if there were no critic
    pin     the first frame is noised and predicted like any other, in all three roles
`python -m benchmarks.ablations ladder STEP_FOLDER OUT` copies a checkpoint and gives it the ladder before the shift.
"""

import json
import shutil
import sys
from pathlib import Path

from torch import Tensor

from cli import cli
from common.condition import Condition, Denoiser
from common.flow import timestep_sigmas
from stage2_distill import trainer
from stage2_distill.checkpointing.format import STUDENT_FILE
from stage2_distill.dmd import losses
from stage2_distill.model import wan


def loss_without_critic(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> Tensor:
    """The DMD loss with the teacher in the critic's place."""
    del critic
    return losses.dmd_loss(x0, condition, teacher=teacher, critic=teacher, sigma=sigma, eps=eps)


def unpinned(x: Tensor, condition: Condition) -> Tensor:
    """Leaves frame 0 as it is."""
    del condition
    return x


def unwarp(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint and write a ladder into it whose sigmas are its indices / 1000, as if never shifted."""
    shutil.copytree(checkpoint, out)
    facts = json.loads((out / STUDENT_FILE).read_bytes())
    s = facts["shift"]
    facts["ladder"] = [1000 * u / (s - (s - 1) * u) for u in (index / 1000 for index in facts["ladder"])]
    print(f"sigmas {timestep_sigmas(facts['ladder'], s=s)}")
    (out / STUDENT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Take the part away and run."""
    part, *rest = sys.argv[1:]
    if part == "ladder":
        unwarp(Path(rest[0]), Path(rest[1]))
        return
    if part == "critic":
        trainer.dmd_loss = loss_without_critic
    elif part == "pin":
        wan.pin = unpinned
    else:
        raise SystemExit(f"{part}: choose critic, pin or ladder")
    cli.main(["distill", *rest[rest[0] == "--" :]], standalone_mode=False)


if __name__ == "__main__":
    main()
