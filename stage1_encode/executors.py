"""Who runs the shard tasks. An engine makes the shards that a survey found unfinished; what it leaves undone because
its process died, the next run does.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

from common.progress import ProgressBar
from stage1_encode.config import EncodeConfig
from stage1_encode.dataset_folder import read_finished_index
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.pipeline import (
    EncoderModels,
    ShardTask,
    load_encoders,
    make_shards,
    start_readers,
    write_negative_embedding,
)

SHARDS_PER_CHUNK = 4  # shards that a Ray worker is given at once, so that reading, models and writing overlap


class ShardExecutor(Protocol):
    """Makes shards {number: rows}, and before them the negative prompt's embedding where it is asked to."""

    def __call__(
        self,
        config: EncodeConfig,
        shard_rows: Mapping[int, int],
        *,
        embed_negative: bool,
        before_writing: Callable[[], None],
    ) -> None:
        """Return when all is made; `begin` is called once the models are there and nothing is written yet."""


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def read_tasks(config: EncodeConfig, numbers: Collection[int]) -> Iterator[ShardTask]:
    """The rows of these shards, read as they are asked for."""
    shards = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=config.text_only)
    for number, rows in enumerate(shards):
        if number in numbers:
            yield ShardTask(number, rows)


def surveyed_tasks(config: EncodeConfig, shard_rows: Mapping[int, int]) -> Iterator[ShardTask]:
    """The first rows of shards {number: rows}; those that the CSV has won since it was surveyed are the next run's.

    ValueError where it has lost some.
    """
    remaining = dict(shard_rows)
    for task in read_tasks(config, shard_rows):
        rows = remaining[task.number]
        if len(task.rows) >= rows:
            del remaining[task.number]
            yield ShardTask(task.number, task.rows[:rows])
    if remaining:
        raise ValueError(f"data={config.data}: lost rows while encode read it; run the same command again")


def run_local(
    config: EncodeConfig, shard_rows: Mapping[int, int], *, embed_negative: bool, before_writing: Callable[[], None]
) -> None:
    """Make the shards in this process."""
    with closing(start_readers(config)) as readers:
        encoders = load_encoders(config)
        before_writing()
        if embed_negative:
            write_negative_embedding(config, encoders)
        for _ in make_shards(
            config, encoders, readers, surveyed_tasks(config, shard_rows), total=sum(shard_rows.values())
        ):
            pass


class EncodeWorker:
    """Holds the models of one GPU, or of one CPU worker, and makes shards; an actor of a Ray cluster."""

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.readers = start_readers(config)

    @cached_property
    def encoders(self) -> EncoderModels:
        """The models."""
        return load_encoders(self.config)

    def load_models(self) -> None:
        """Read the models; a mistake comes out here and not with the end of the actor."""
        _ = self.encoders

    def embed_negative(self) -> None:
        """Embed the negative prompt."""
        write_negative_embedding(self.config, self.encoders)

    def encode_chunk(self, chunk: Sequence[ShardTask]) -> int:
        """Make some shards, those left out that a lost worker finished; the number of rows that they stand for."""
        rows = sum(len(task.rows) for task in chunk)
        unfinished = [
            task for task in chunk if read_finished_index(Path(self.config.out), task.number, len(task.rows)) is None
        ]
        for _ in make_shards(self.config, self.encoders, self.readers, unfinished, total=rows):
            pass
        return rows


def run_on_ray_cluster(
    config: EncodeConfig, shard_rows: Mapping[int, int], *, embed_negative: bool, before_writing: Callable[[], None]
) -> None:
    """Make the shards on the Ray cluster of RAY_ADDRESS, or on this machine, with one worker a GPU.

    A lost worker is started again and its shards made again. ValueError without Ray, or without a GPU where one is due.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError("engine=ray: Ray is not installed; pip install 'ti2v-distill[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise ValueError("device=cuda: the Ray cluster has no GPU; give --device cpu")
    actor_class = ray.remote(num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1)(EncodeWorker)
    workers = [
        actor_class.remote(config.with_absolute_paths)
        for _ in range(min(gpus or 1, max(1, -(-len(shard_rows) // SHARDS_PER_CHUNK))))
    ]
    pool, pending_tasks = ActorPool(workers), surveyed_tasks(config, shard_rows)
    try:
        ray.get([worker.load.remote() for worker in workers])
        before_writing()
        if embed_negative:
            ray.get(workers[0].embed_negative.remote())
        with ProgressBar(sum(shard_rows.values()), label="encode") as progress:
            while chunk := list(islice(pending_tasks, SHARDS_PER_CHUNK)):
                if not pool.has_free():
                    progress.advance(count=pool.get_next_unordered())
                pool.submit(lambda worker, chunk: worker.make.remote(chunk), chunk)
            while pool.has_next():
                progress.advance(count=pool.get_next_unordered())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as this process would have said it


EXECUTORS: dict[str, ShardExecutor] = {"local": run_local, "ray": run_on_ray_cluster}
