"""Who runs the shard tasks. An engine makes the shards that a survey found unfinished; what it leaves undone because
its process died, the next run does.
"""

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from common.progress import Progress
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


class Worker:
    """Holds the models of one GPU, or of one CPU worker, and makes shards; an actor of a Ray cluster."""

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.encoders = load_encoders(config)

    def begin(self) -> None:
        """Embed the negative prompt."""
        write_negative(self.config, self.encoders)

    def make(self, task: Task) -> int:
        """Make one shard; the number of rows that it stands for."""
        for _ in make_shards(self.config, self.encoders, [task], total=len(task.rows)):
            pass
        return len(task.rows)


def run_on_ray(config: EncodeConfig, numbers: Collection[int]) -> None:
    """Make the shards on the Ray cluster of RAY_ADDRESS, or on this machine, with one worker a GPU.

    A lost worker is started again and its shard made again. ValueError without Ray.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError("engine=ray: Ray is not installed; pip install 'ti2v-distill[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1)(Worker)
    workers = [actor.remote(config) for _ in range(gpus or 1)]
    ray.get(workers[0].begin.remote())
    with Progress(len(numbers) * config.shard_size, label="encode") as progress:
        for rows in ActorPool(workers).map_unordered(
            lambda worker, task: worker.make.remote(task), tasks(config, numbers)
        ):
            progress.advance(count=rows)


ENGINES: dict[str, Engine] = {"local": run_here, "ray": run_on_ray}
