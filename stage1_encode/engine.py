"""Who runs the shard tasks. An engine makes the shards that a survey found unfinished; what it leaves undone because
its process died, the next run does.
"""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from stage1_encode.config import EncodeConfig
from stage1_encode.pipeline import Task, load_encoders, make_shards, write_negative
from stage1_encode.rows import read_shards

Engine = Callable[[EncodeConfig, Collection[int]], None]  # makes the shards of these numbers


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def tasks(config: EncodeConfig, numbers: Collection[int]) -> Iterator[Task]:
    """The rows of these shards, read as they are asked for."""
    shards = read_shards(Path(config.data), shard_size=config.shard_size, text_only=config.text_only)
    for number, rows in enumerate(shards):
        if number in numbers:
            yield Task(number, rows)


def run_here(config: EncodeConfig, numbers: Collection[int]) -> None:
    """Make the shards in this process."""
    encoders = load_encoders(config)
    write_negative(config, encoders)
    for _ in make_shards(config, encoders, tasks(config, numbers), total=len(numbers) * config.shard_size):
        pass


ENGINES: dict[str, Engine] = {"local": run_here}
