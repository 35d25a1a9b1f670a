"""Remove one part of the algorithm and distill again: `evaluate` must then measure a worse student.

`python -m benchmarks.ablations critic|pin -- <options of distill>` trains without that part:
    critic  the teacher replaces the critic in the DMD loss
    pin     the first frame is noised and predicted like the others, in all three roles
`python -m benchmarks.ablations ladder STEP_FOLDER OUT` copies a checkpoint and
undoes the shift of its timesteps.
"""

import json
import shutil
import sys
from pathlib import Path

from torch import Tensor

from cli import cli
from common.condition import Condition, Denoiser
from common.flow import timestep_sigmas
from stage2_distill.checkpointing.format import STUDENT_FILE
from stage2_distill.dmd import losses, student_objective
from stage2_distill.model import wan


def scores_without_critic(
    x0: Tensor, condition: Condition, *, teacher: Denoiser, critic: Denoiser, sigma: Tensor, eps: Tensor
) -> losses.Scores:
    """Compute the scores with the teacher in place of the critic."""
    del critic
    return losses.compare_scores(x0, condition, teacher=teacher, critic=teacher, sigma=sigma, eps=eps)


def keep_frame(x: Tensor, condition: Condition) -> Tensor:
    """Leave frame 0 unchanged."""
    del condition
    return x


def undo_shift(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint and write timesteps into it whose sigmas are the old timesteps / 1000, without a shift."""
    shutil.copytree(checkpoint, out)
    facts = json.loads((out / STUDENT_FILE).read_bytes())
    s = facts["shift"]
    facts["ladder"] = [1000 * u / (s - (s - 1) * u) for u in (index / 1000 for index in facts["ladder"])]
    print(f"sigmas {timestep_sigmas(facts['ladder'], s=s)}")
    (out / STUDENT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Remove the part and train."""
    part, *rest = sys.argv[1:]
    if part == "ladder":
        undo_shift(Path(rest[0]), Path(rest[1]))
        return
    if part == "critic":
        student_objective.compare_scores = scores_without_critic
    elif part == "pin":
        wan.pin = keep_frame
    else:
        raise SystemExit(f"{part}: choose critic, pin or ladder")
    cli.main(["distill", *rest[rest[0] == "--" :]], standalone_mode=False)


if __name__ == "__main__":
    main()
