"""Kills forked trainers KILLS times, then lets one end: `kill_worker.py CONFIG KILLS`.

Prints how many were killed and how many of them in a checkpoint.
Every second one dies at a random moment, the others just before a random one of the calls that make a checkpoint.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.options import resolve_config
from stage2_distill.config import DistillConfig
from stage2_distill.train import distill

CONFIG, KILLS = resolve_config(DistillConfig, {"config": sys.argv[1]}), int(sys.argv[2])
CALLS = ((os, "fsync"), (Path, "replace"), (shutil, "rmtree"))


def die_at(number: int) -> None:
    """Let the process die before the `number`th of the calls that matter to a checkpoint."""
    left = [number]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args, **options) -> object:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))


def start(call: int | None) -> int:
    child = os.fork()
    if child:
        return child
    if call is not None:
        die_at(call)
    distill(CONFIG)
    os._exit(0)


def main() -> None:
    draw, killed, inside = random.Random(0), 0, 0
    while killed < KILLS:
        call = draw.randint(1, 24) if killed % 2 else None
        child = start(call)
        if call is None:
            time.sleep(draw.uniform(0.05, 1.5))
            os.kill(child, signal.SIGKILL)
        code = os.waitpid(child, 0)[1]
        inside += code == signal.SIGKILL and call is not None
        killed += code == signal.SIGKILL
        if code != signal.SIGKILL:
            assert code == 0, code
            shutil.rmtree(CONFIG.out)  # it ended first: begin anew
    code = os.waitpid(start(None), 0)[1]
    sys.stdout.write(f"{killed} {inside}\n")
    sys.exit(bool(code))


main()
