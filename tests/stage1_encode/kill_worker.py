"""Kills forked encodes at KILLS random moments, then lets one end; arguments: MODEL CSV OUT KILLS WORLD [SIZES]."""

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
SIZES = sys.argv[6] if len(sys.argv) > 6 else ""


def start(rank: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(WORLD)
    options = {"shard_size": 2, "text_dtype": "float32", "device": "cpu", "workers": 1, "sizes": SIZES}
    encode(EncodeConfig(TABLE, MODEL, OUT, 9, 64, 96, **options))
    os._exit(0)


def main() -> None:
    draw, killed = random.Random(0), 0
    while killed < KILLS:
        children = [start(rank) for rank in range(WORLD)]
        time.sleep(draw.uniform(0.0, 3.0 if SIZES else 0.8))  # several sizes: the files are read twice
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
