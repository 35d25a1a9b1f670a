"""What reading shards costs: opening, ordering, throughput against plain reading and webdataset, data wait at pace.

    python -m benchmarks.stream [--records 1536] [--folder FOLDER] [--rounds 5] [--no-pace]

Records have the true size (704x1280, about 130 text rows). Cold means that the page cache was told to drop the files.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import webdataset
from safetensors.torch import load

from benchmarks.report import append, peak
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
PACE, UPDATES = 6.7, 8  # seconds of one critic update on one H100 (REFERENCE section 5); updates replayed


def make(folder: Path, records: int) -> None:
    """Write a data set of the true record size, if it is not there."""
    if (folder / "manifest.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number in range(-(-records // SHARD)):
        made = (record(index) for index in range(number * SHARD, min(records, (number + 1) * SHARD)))
        shards.append(write_shard(folder, shard_file_name(number), made, failures=[], rows_sha256="").shard)
    write_manifest(folder, Manifest(1, SPEC, ENCODER, tuple(shards), 0), torch.zeros(8, TEXT_DIM))


def record(index: int) -> Record:
    """A record of the true size."""
    draws = make_generator(0, index, 0, "benchmark")
    rows = int(torch.randint(40, 220, (1,), generator=draws))
    frame = torch.randn(SPEC.first_frame_shape, generator=draws).bfloat16()
    text = torch.randn((rows, TEXT_DIM), generator=draws).bfloat16()
    return Record(f"{index:09d}", RecordSource("a prompt", f"{index}.mp4", index + 2), frame, text)


def drop(folder: Path) -> None:
    """Tell the page cache to forget the tars."""
    os.sync()
    for path in folder.glob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: Path) -> int:
    """Read the tars one after another, a megabyte at a time."""
    total = 0
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while piece := file.read(1 << 20):
                total += len(piece)
    return total


def by_webdataset(folder: Path) -> int:
    """Stream the tars with webdataset, in order, tensors decoded, nothing checked."""
    handler = webdataset.handle_extension("safetensors", load)
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode(handler)
    return sum(tensor.nbytes for sample in samples for tensor in sample["safetensors"].values())


def by_stream(data: DataSet, threads: int) -> int:
    """One shuffled epoch: every record checked, tensors decoded, two a thread read ahead."""
    stream = RecordStream(data, seed=0)

    def read(position: int) -> int:
        made = data.read_record(stream.record_index(position))
        return sum(x.nbytes for x in (made.first_frame, made.text) if x is not None)

    return sum(prefetch_ordered(read, range(data.num_records), depth=2 * threads, threads=threads))


def rate(read: Callable[[], int]) -> float:
    """Megabytes a second of one pass."""
    began = time.perf_counter()
    total = read()
    return total / (time.perf_counter() - began) / 1e6


def throughput(folder: Path, rounds: int) -> Iterable[tuple[str, str]]:
    """Plain reading, webdataset and the stream, by turns: the host's own cache favours whoever comes last."""
    data = open_data_set(folder)
    readers: dict[str, Callable[[], int]] = {
        "plain sequential reading": partial(plain, folder),
        "webdataset, in order, unchecked": partial(by_webdataset, folder),
    }
    readers |= {f"shuffled and checked, {n} threads": partial(by_stream, data, n) for n in (1, 2, 4, 8)}
    plain(folder)
    for name in ("cold", "warm"):
        rates: dict[str, list[float]] = {label: [] for label in readers}
        growth = dict.fromkeys(readers, 0.0)
        for label, read in list(readers.items()) * rounds:
            if name == "cold":
                drop(folder)
            before = peak(reset=True)
            rates[label].append(rate(read))
            growth[label] = max(growth[label], peak() - before)
        base = statistics.median(rates["plain sequential reading"])
        for label, found in rates.items():
            own = statistics.median(found)
            note = f"median {own:.0f} MB/s ({min(found):.0f} to {max(found):.0f}), {own / base:.2f} of plain"
            yield f"{name}: {label}", f"{note}, peak memory {growth[label]:+.0f} MB"


def opening(folder: Path) -> Iterable[tuple[str, str]]:
    """A manifest of 100 million records."""
    shards = tuple(
        ShardInfo(shard_file_name(n), 500, 500, f"{n:064x}", 650_000_000, f"{n:064x}") for n in range(200_000)
    )
    write_manifest(folder, Manifest(1, SPEC, ENCODER, shards, 0), torch.zeros(8, TEXT_DIM))
    del shards
    began, before = time.perf_counter(), peak(reset=True)
    data = open_data_set(folder)
    took, now = time.perf_counter() - began, peak()
    yield "open 100 M records in 200,000 shards", f"{took:.2f} s, peak {now:.0f} MB ({now - before:+.0f} MB)"
    began = time.perf_counter()
    for index in range(100_000):
        permute_index(index, count=data.num_records, seed=0, epoch=0)
    yield "order, per index", f"{(time.perf_counter() - began) * 10:.1f} us"


def pace(folder: Path, ranks: int) -> Iterable[tuple[str, str]]:
    """Wait for data while `ranks` GPUs' worth of records is used up at the 5B's pace, from cold files."""
    drop(folder)
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


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1536)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ti2v-stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-pace", action="store_true", help="leave out the data wait, which takes a minute")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        rows = list(opening(Path(empty)))
    make(given.folder, given.records)
    rows += throughput(given.folder, given.rounds)
    if not given.no_pace:
        rows += pace(given.folder, 8)
    append("stream", rows)


if __name__ == "__main__":
    main()
