"""`encode` from end to end on one GPU, then on all of torchrun's, each with its shards as the command gives them out.

    torchrun --nproc-per-node 2 -m benchmarks.encode_ranks [--tiny] [--rows 512] [--clips 64]

Random encoders of the true size; --rows is what each GPU encodes, in both cases.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import clips
from benchmarks.encode import SOURCE, make_config, wait_for, write_rows
from benchmarks.models import fresh, memory, pictures
from benchmarks.random_models import TINY, TRUE, random_text, random_vae
from benchmarks.report import append
from common.device import pick_device
from stage1_encode.config import EncodeConfig
from stage1_encode.executors import rank_and_world
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.pipeline import make_shards, start_readers, write_negative_embedding

Row = tuple[str, str]


def make_rows(work: Path, count: int, rows: int) -> Path:
    """A CSV of clips, made once for all ranks."""
    (work / "clips").mkdir()
    wait_for(clips.start(SOURCE, work / "clips", count, max(1, (os.cpu_count() or 2) - 2)))
    return write_rows(work, [clips.clip_path(work / "clips", number) for number in range(count)], rows)


def encode(config: EncodeConfig, encoders: RowEncoder, numbers: range) -> tuple[int, float]:
    """Make shards; how many records, and seconds until the slowest rank has made its own."""
    with closing(start_readers(config)) as readers:
        time.sleep(4)  # a real run loads its models meanwhile
        dist.barrier()
        began = time.perf_counter()
        rows = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False)
        shards = {number: shard for number, shard in enumerate(rows) if number in numbers}
        made = make_shards(config, encoders, readers, shards)
        records = torch.tensor(sum(index.shard.records for _, index in made))
        dist.barrier()
        took = time.perf_counter() - began
    dist.all_reduce(records)
    return int(records), took


def measure(given: argparse.Namespace, work: Path) -> Iterator[Row]:
    """One GPU alone, then all."""
    rank, world = rank_and_world()
    size, device = TINY if given.tiny else TRUE, pick_device("cpu" if given.tiny else "cuda")
    start = time.perf_counter()
    if rank == 0:
        make_rows(work, given.clips, given.rows * world)
    dist.barrier()
    config = make_config(work, work / "rows.csv", given, f"out-{rank}", workers=2 if given.tiny else 16)
    encoder = random_text(size, device)
    encoder.model.bfloat16()
    encoders = RowEncoder(fresh(random_vae(size, device), config.vae_dtype), encoder)
    write_negative_embedding(config, encoders)  # warms up, as the frames do
    vae.encode_frames(encoders.vae, pictures(size, config.batch_size, device))
    yield "clips and models made after", f"{time.perf_counter() - start:.1f} s"
    shards = -(-given.rows // given.shard_size)
    rates = []
    for ranks, numbers in ((1, range(0 if rank else shards)), (world, range(shards * world)[rank::world])):
        records, took = encode(config, encoders, numbers)
        rates.append(records / took / ranks)
        yield f"encode on {ranks} GPU(s)", f"{records / took:.1f} records/s ({records} in {took:.1f} s), {memory()}"
    yield f"a GPU's rate among {world}, against one alone", f"{rates[1] / rates[0]:.3f}"


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    for name, default in (("clips", 64), ("rows", 512), ("shard-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as made:
        places = [made]
        dist.broadcast_object_list(places)
        rows = []
        for row in measure(given, Path(places[0])):
            rows.append(row)
            if dist.get_rank() == 0:
                print(*row, sep=": ", flush=True)
        dist.barrier()
    if dist.get_rank() == 0 and not given.tiny:
        append("encode_ranks", rows, model="random weights of the true size")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
