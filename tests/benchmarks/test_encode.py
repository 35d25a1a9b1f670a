"""The benchmarks of stage one on several GPUs run at tiny size, on two ranks and on Ray."""

import re

import pytest

from tests.forked import run_python

SIZES = ("--tiny", "--rows", "16", "--shard-size", "4", "--clips", "2")


def run_benchmark(*command: str, ranks: int = 0) -> str:
    done = run_python(*command, *SIZES, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks() -> None:
    text = run_benchmark("-m", "benchmarks.encode_ranks", ranks=2)
    for gpus, records in ((1, 16), (2, 32)):
        assert re.search(rf"\nencode on {gpus} GPU\(s\): .* \({records} in ", text)


def test_ray() -> None:
    pytest.importorskip("ray")
    text = run_benchmark("-m", "benchmarks.encode_ray")
    assert re.search(r"\nencode --engine ray, no GPU\(s\): \d+\.\d records/s .*, 16 records\n", text)
