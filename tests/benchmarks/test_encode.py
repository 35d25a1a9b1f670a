"""The benchmarks of stage one on several GPUs run at tiny size, under torchrun and on Ray."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = ("--tiny", "--rows", "16", "--shard-size", "4", "--clips", "2")


def run_benchmark(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, *SIZES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    text = run_benchmark(*launcher, "-m", "benchmarks.encode_ranks")
    for gpus, records in ((1, 16), (2, 32)):
        assert re.search(rf"\nencode on {gpus} GPU\(s\): .* \({records} in ", text)


def test_ray() -> None:
    pytest.importorskip("ray")
    text = run_benchmark("-m", "benchmarks.encode_ray")
    assert re.search(r"\nencode --engine ray, no GPU\(s\): \d+\.\d records/s .*, 16 records\n", text)
