"""What reading shards costs: opening, shuffling, throughput against plain reading and webdataset, wait for data.

    python -m benchmarks.stream [--records 1536] [--folder FOLDER] [--rounds 5] [--no-pace]

Records have the true size (704x1280, about 130 text rows). Cold: the page cache was told to drop the files.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load

from benchmarks.runner import Row, parse_arguments, resident_peak_mb, run_benchmark
from common.seed import make_generator
from common.video import VideoSpec
from shards.dataset import DataSet, open_data_set, prefetch_ordered
from shards.manifest import EncoderInfo, Manifest, ShardInfo, write_manifest
from shards.mixture import RecordStream
from shards.record import Record, RecordSource
from shards.shuffle import permute_index
from shards.writer import shard_file_name, write_shard

SPEC, TEXT_DIM, SHARD = VideoSpec(), 4096, 256
ENCODER = EncoderInfo("vae", "text", "tokenizer", "float32", "bfloat16", TEXT_DIM, "")
PACE, UPDATES = 6.7, 8  # seconds of one critic update on one H100; updates replayed


def make_data(folder: Path, records: int) -> None:
    """Write a data set of the true record size, unless it exists."""
    if (folder / "manifest.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number in range(-(-records // SHARD)):
        made = (random_record(index) for index in range(number * SHARD, min(records, (number + 1) * SHARD)))
        shards.append(write_shard(folder, shard_file_name(number), made, failures=[], rows_sha256="").shard)
    write_manifest(folder, Manifest(1, SPEC, ENCODER, tuple(shards), 0), torch.zeros(8, TEXT_DIM))


def random_record(index: int) -> Record:
    """Return a record of the true size."""
    generator = make_generator(0, index, 0, "benchmark")
    rows = int(torch.randint(40, 220, (1,), generator=generator))
    frame = torch.randn(SPEC.first_frame_shape, generator=generator).bfloat16()
    text = torch.randn((rows, TEXT_DIM), generator=generator).bfloat16()
    return Record(f"{index:09d}", RecordSource("a prompt", f"{index}.mp4", index + 2), frame, text)


def drop_page_cache(folder: Path) -> None:
    """Tell the page cache to forget the tars."""
    os.sync()  # dirty pages are not dropped
    for path in folder.glob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> int:
    """Read the tars one after another, one megabyte at a time; returns the bytes."""
    total = 0
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while piece := file.read(1 << 20):
                total += len(piece)
    return total


def read_with_webdataset(folder: Path) -> int:
    """Stream the tars with webdataset, in order, with tensors decoded and nothing checked; returns the bytes."""
    handler = webdataset.handle_extension("safetensors", load)
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode(handler)
    return sum(tensor.nbytes for sample in samples for tensor in sample["safetensors"].values())


def read_with_stream(data: DataSet, threads: int) -> int:
    """Read one shuffled epoch: every record checked, tensors decoded, two read ahead per thread; returns the bytes."""
    stream = RecordStream(data, seed=0)

    def read(position: int) -> int:
        record = data.read_record(stream.record_index(position))
        return sum(x.nbytes for x in (record.first_frame, record.text) if x is not None)

    return sum(prefetch_ordered(read, range(data.num_records), depth=2 * threads, threads=threads))


def read_rate(read: Callable[[], int]) -> float:
    """Return the megabytes per second of one pass."""
    began = time.perf_counter()
    total = read()
    return total / (time.perf_counter() - began) / 1e6


def throughput_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Time plain reading, webdataset and the stream in turn: the host's own cache favors the last of a series."""
    data = open_data_set(folder)
    readers: dict[str, Callable[[], int]] = {
        "plain sequential reading": partial(read_plainly, folder),
        "webdataset, in order, unchecked": partial(read_with_webdataset, folder),
    }
    readers |= {f"shuffled and checked, {n} threads": partial(read_with_stream, data, n) for n in (1, 2, 4, 8)}
    read_plainly(folder)
    for name in ("cold", "warm"):
        rates: dict[str, list[float]] = {label: [] for label in readers}
        growth = dict.fromkeys(readers, 0.0)
        for label, read in list(readers.items()) * rounds:
            if name == "cold":
                drop_page_cache(folder)
            before = resident_peak_mb(reset=True)
            rates[label].append(read_rate(read))
            growth[label] = max(growth[label], resident_peak_mb() - before)
        base = statistics.median(rates["plain sequential reading"])
        for label, values in rates.items():
            own = statistics.median(values)
            note = f"median {own:.0f} MB/s ({min(values):.0f} to {max(values):.0f}), {own / base:.2f} of plain"
            yield f"{name}: {label}", f"{note}, peak memory {growth[label]:+.0f} MB"


def opening_rows(folder: Path) -> Iterator[Row]:
    """Open a manifest of 100 million records, and shuffle indices of it."""
    shards = tuple(
        ShardInfo(shard_file_name(n), 500, 500, f"{n:064x}", 650_000_000, f"{n:064x}") for n in range(200_000)
    )
    write_manifest(folder, Manifest(1, SPEC, ENCODER, shards, 0), torch.zeros(8, TEXT_DIM))
    del shards
    began, before = time.perf_counter(), resident_peak_mb(reset=True)
    data = open_data_set(folder)
    took, now = time.perf_counter() - began, resident_peak_mb()
    yield "open 100 M records in 200,000 shards", f"{took:.2f} s, peak {now:.0f} MB ({now - before:+.0f} MB)"
    began = time.perf_counter()
    for index in range(100_000):
        permute_index(index, count=data.num_records, seed=0, epoch=0)
    yield "order, per index", f"{(time.perf_counter() - began) * 10:.1f} us"


def pace_rows(folder: Path, ranks: int) -> Iterator[Row]:
    """Measure the wait for data if `ranks` GPUs consume records at the rate of the 5B model, from cold files."""
    drop_page_cache(folder)
    stream = RecordStream(open_data_set(folder), seed=1)
    plans = (range(u * ranks, (u + 1) * ranks) for u in range(UPDATES))
    batches, waited = prefetch_ordered(stream.read_batch, plans, depth=2, threads=2), 0.0
    for _ in range(UPDATES):
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
        time.sleep(PACE)
    share = waited / (waited + UPDATES * PACE)
    yield f"data wait of {ranks} GPUs at {PACE} s an update, first batch included", f"{share:.3%}"


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure opening, throughput and, unless --no-pace, the data wait, which takes a minute."""
    with tempfile.TemporaryDirectory() as empty:
        yield from opening_rows(Path(empty))
    make_data(options.folder, options.records)
    yield from throughput_rows(options.folder, options.rounds)
    if not options.no_pace:
        yield from pace_rows(options.folder, 8)


def main() -> None:
    """Measure, print and append to the results."""
    folder = Path(tempfile.gettempdir()) / "ti2v-stream"
    run_benchmark("stream", measure(parse_arguments(__doc__, records=1536, folder=folder, rounds=5, no_pace=False)))


if __name__ == "__main__":
    main()
