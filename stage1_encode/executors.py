"""Who makes the shards: this process or a Ray cluster, or, from files of another program, nobody's models.

Shards that a dead process leaves are left to the next run.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path

from common.progress import ProgressBar
from shards.record import Record
from shards.writer import RowFailure, ShardIndex
from stage1_encode.config import EncodeConfig
from stage1_encode.dataset_folder import read_finished_index
from stage1_encode.imported_latents.latent_source import LatentSource, open_source, read_negative, record_layout
from stage1_encode.imported_latents.stored_clip import ClipError, RecordLayout, to_record
from stage1_encode.media.rows import Row
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.pipeline import (
    EncodedShard,
    RowCounter,
    load_encoders,
    make_shards,
    save_negative_embedding,
    save_shard,
    start_readers,
    write_negative_embedding,
)

SHARDS_PER_CHUNK = 4  # per call of a Ray worker, so that reading, models and writing overlap


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class LocalExecutor:
    """Encodes shards with the models of one device, in this process or as an actor of a Ray cluster.

    Call `load`, then `embed_negative` and `run`, at last `close`. One device needs no `shard_count`.
    """

    def __init__(self, config: EncodeConfig, shard_count: int = 1) -> None:
        self.config = config
        self.readers = start_readers(config)

    @cached_property
    def encoders(self) -> RowEncoder:
        """Both models."""
        return load_encoders(self.config)  # here and not in `load`, which Ray does not repeat after a restart

    def load(self) -> None:
        """Load the models; nothing is written yet. ValueError if one cannot be read."""
        _ = self.encoders

    def embed_negative(self) -> None:
        """Write the negative prompt's embedding."""
        write_negative_embedding(self.config, self.encoders)

    def run(self, shards: Mapping[int, list[Row]]) -> dict[int, ShardIndex]:
        """Encode shards {number: rows}; those that a lost Ray worker has finished are only read."""
        folder = Path(self.config.out)
        candidates = {number: read_finished_index(folder, number, len(rows)) for number, rows in shards.items()}
        finished = {number: index for number, index in candidates.items() if index}
        unfinished = {number: rows for number, rows in shards.items() if number not in finished}
        return finished | dict(make_shards(self.config, self.encoders, self.readers, unfinished))

    def close(self) -> None:
        """End the processes that read files."""
        self.readers.close()


class RayExecutor:
    """Encodes on the Ray cluster of RAY_ADDRESS, or on this machine, with a `LocalExecutor` per GPU.

    Ray restarts a lost worker and repeats its call. Raises ValueError if Ray is not
    installed, or if `device` is cuda and the cluster has no GPU.
    """

    def __init__(self, config: EncodeConfig, shard_count: int) -> None:
        try:
            import ray.util
        except ImportError as error:
            raise ValueError("engine=ray: Ray is not installed; pip install 'ti2v-distill[ray]'") from error
        self.ray = ray
        # The address is taken from RAY_ADDRESS.
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        if config.device == "cuda" and not gpus:
            raise ValueError("device=cuda: the Ray cluster has no GPU; give --device cpu")
        chunks = max(1, -(-shard_count // SHARDS_PER_CHUNK))  # rounded up
        actor = ray.remote(num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=-1)(LocalExecutor)
        self.workers = [actor.remote(config.with_absolute_paths) for _ in range(min(gpus or 1, chunks))]

    def load(self) -> None:
        """Load the models of all workers."""
        with self._worker_errors():
            self.ray.get([worker.load.remote() for worker in self.workers])

    def embed_negative(self) -> None:
        """Write the negative prompt's embedding, on one worker."""
        with self._worker_errors():
            self.ray.get(self.workers[0].embed_negative.remote())

    def run(self, shards: Mapping[int, list[Row]]) -> dict[int, ShardIndex]:
        """Encode shards {number: rows}, a chunk per call; returns their sidecars."""
        pool, remaining = self.ray.util.ActorPool(self.workers), iter(shards.items())
        indices: dict[int, ShardIndex] = {}
        total = sum(len(rows) for rows in shards.values())
        with self._worker_errors(), ProgressBar(total, label="encode") as progress:
            while len(indices) < len(shards):
                # has_free first: a chunk that is taken from the iterator must be submitted
                while pool.has_free() and (chunk := dict(islice(remaining, SHARDS_PER_CHUNK))):
                    pool.submit(lambda worker, chunk: worker.run.remote(chunk), chunk)
                new_indices = pool.get_next_unordered()
                indices |= new_indices
                progress.advance(count=sum(index.shard.rows for index in new_indices.values()))
        return indices

    def close(self) -> None:
        """Drop the workers: Ray ends an actor that nothing refers to."""
        self.workers.clear()

    @contextmanager
    def _worker_errors(self) -> Iterator[None]:
        try:
            yield
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None  # as a local run would raise it


class ImportExecutor:
    """Makes shards of latents and embeddings of another program; no model is loaded and no device is used."""

    def __init__(self, config: EncodeConfig, source: LatentSource) -> None:
        self.config, self.source = config, source

    @cached_property
    def layout(self) -> RecordLayout:
        """What records must look like."""
        return record_layout(self.config, self.source)

    def load(self) -> None:
        """Read the model's settings; nothing is written yet. ValueError if it is not a TI2V-5B."""
        _ = self.layout

    def embed_negative(self) -> None:
        """Write the negative prompt's embedding."""
        save_negative_embedding(self.config, read_negative(self.config, self.source).text)

    def run(self, shards: Mapping[int, list[Row]]) -> dict[int, ShardIndex]:
        """Write shards {number: rows}; returns their sidecars."""
        indices: dict[int, ShardIndex] = {}
        with ProgressBar(sum(len(rows) for rows in shards.values()), label="encode") as progress:
            counter = RowCounter(progress, self.config.stop_after_failures)
            for number, rows in shards.items():
                indices[number] = save_shard(self.config, number, rows, self._convert_rows(rows, counter))
        return indices

    def _convert_rows(self, rows: list[Row], counter: RowCounter) -> EncodedShard:
        records, failures = list[Record](), list[RowFailure]()
        clips = self.source.read_clips(rows, text_only=self.config.text_only)
        for row, clip in zip(rows, clips, strict=True):
            problem = ""
            try:
                records.append(to_record(row, clip, self.layout))
            except ClipError as error:
                problem = str(error)
                failures.append(RowFailure(row.line, row.path, problem))
            counter.count_row(problem)
        note = f"latents of {self.source.program}; --model states what encoded them"
        return EncodedShard(records, failures, Counter({note: len(records)}), None)

    def close(self) -> None:
        """Nothing is held."""


EXECUTORS: dict[str, type[LocalExecutor] | type[RayExecutor]] = {"local": LocalExecutor, "ray": RayExecutor}


def make_executor(config: EncodeConfig, shard_count: int) -> LocalExecutor | RayExecutor | ImportExecutor:
    """Who makes the shards of a data set."""
    source = open_source(Path(config.data))
    return ImportExecutor(config, source) if source else EXECUTORS[config.engine](config, shard_count)
