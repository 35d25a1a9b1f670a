"""Kills forked encodes at KILLS random moments, then lets one end: `kill_worker.py MODEL CSV OUT KILLS WORLD`."""

import os
import random
import shutil
import signal
import sys
import time

from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode

MODEL, TABLE, OUT = sys.argv[1:4]
KILLS, WORLD = int(sys.argv[4]), int(sys.argv[5])


def start(rank: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(WORLD)
    encode(EncodeConfig(TABLE, MODEL, OUT, 9, 64, 96, shard_size=2, text_dtype="float32", device="cpu", workers=1))
    os._exit(0)


def main() -> None:
    draw, killed = random.Random(0), 0
    while killed < KILLS:
        children = [start(rank) for rank in range(WORLD)]
        time.sleep(draw.uniform(0.0, 0.8))
        for child in children:
            os.kill(child, signal.SIGKILL)
        hit = sum(os.waitpid(child, 0)[1] == signal.SIGKILL for child in children)
        killed += hit
        if not hit:  # it ended first: begin anew
            shutil.rmtree(OUT)
    codes = [os.waitpid(child, 0)[1] for child in [start(rank) for rank in range(WORLD)]]
    sys.stdout.write(f"{killed}\n")
    sys.exit(any(codes))


main()
