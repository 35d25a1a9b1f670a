"""`encode` from end to end on one GPU, then on all of torchrun's, each with its shards as the command assigns them.

    torchrun --nproc-per-node 2 -m benchmarks.encode_ranks [--tiny] [--rows 512] [--clips 64] [--shard-size 256]

Random encoders of the true size; --rows is what each GPU encodes, in both cases.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.encode import READER_START, make_config, start_clips, wait_for_clips, write_rows
from benchmarks.models import make_frame_encoder, make_pictures
from benchmarks.random_models import TINY, TRUE, random_text_encoder, random_vae
from benchmarks.runner import RANDOM_WEIGHTS, Row, parse_arguments, peak_text, run_benchmark
from common.device import pick_device
from stage1_encode.config import EncodeConfig
from stage1_encode.executors import rank_and_world
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.pipeline import make_shards, start_readers, write_negative_embedding


def time_shards(config: EncodeConfig, encoders: RowEncoder, numbers: range) -> tuple[int, float]:
    """Make shards; returns the records of all ranks, and the seconds until the slowest rank has made its own."""
    with closing(start_readers(config)) as readers:
        time.sleep(READER_START)
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


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure one GPU alone, then all."""
    rank, world = rank_and_world()
    size, device = TINY if options.tiny else TRUE, pick_device("cpu" if options.tiny else "cuda")
    start = time.perf_counter()
    if rank == 0:
        makers, paths = start_clips(folder, options.clips)
        wait_for_clips(makers)
        write_rows(folder, paths, options.rows * world)
    dist.barrier()
    workers = 2 if options.tiny else 16
    config = make_config(options, folder / "rows.csv", folder / f"out-{rank}", workers=workers)
    encoder = random_text_encoder(size, device)
    encoder.model.bfloat16()
    encoders = RowEncoder(make_frame_encoder(random_vae(size, device), config.vae_dtype), encoder)
    write_negative_embedding(config, encoders)  # warms the text encoder up
    vae.encode_frames(encoders.vae, make_pictures(size, config.batch_size, device))
    yield "clips and models made after", f"{time.perf_counter() - start:.1f} s"
    shards = -(-options.rows // options.shard_size)
    rates = []
    for ranks, numbers in ((1, range(0 if rank else shards)), (world, range(shards * world)[rank::world])):
        records, took = time_shards(config, encoders, numbers)
        rates.append(records / took / ranks)
        figure = f"{records / took:.1f} records/s ({records} in {took:.1f} s), {peak_text()}"
        yield f"encode on {ranks} GPU(s)", figure
    yield f"a GPU's rate among {world}, against one alone", f"{rates[1] / rates[0]:.3f}"


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, clips=64, rows=512, shard_size=256)
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [temporary]
        dist.broadcast_object_list(folders)
        rows = measure(options, Path(folders[0]))
        run_benchmark("encode_ranks", rows, keep=not options.tiny, rank=dist.get_rank(), model=RANDOM_WEIGHTS)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
