"""`encode --engine ray` as a user gives it: on one GPU, two, four, as many as there are; a run each, of its own shards.

    python -m benchmarks.encode_ray [--tiny] [--rows 2048] [--shard-size 64] [--clips 48]

A model folder of random encoders of the true size is written first; --rows is what each GPU encodes, in both cases.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.encode import write_rows
from benchmarks.encode_ranks import make_rows
from benchmarks.random_models import TINY, TRUE, Size, autoencoder, random_text
from benchmarks.report import append
from shards.manifest import read_manifest

Row = tuple[str, str]


def write_model(folder: Path, size: Size, device: torch.device) -> None:
    """VAE with a small decoder, text encoder in bf16 and tokenizer, as a model folder has them."""
    torch.manual_seed(0)
    autoencoder(size, device, decoder=8).save_pretrained(folder / "vae")
    encoder = random_text(size, device)
    encoder.model.bfloat16().save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")


def run(given: argparse.Namespace, work: Path, gpus: list[int]) -> Iterator[Row]:
    """One run of the command; the rate between the first shard and the last."""
    out, size, count = work / f"out-{len(gpus)}", TINY if given.tiny else TRUE, max(1, len(gpus))
    table = write_rows(work, sorted(work.glob("clips/*")), given.rows * count)
    command = [sys.executable, "cli.py", "encode", "--engine", "ray", "--data", str(table)]
    command += ["--model", str(work / "model"), "--out", str(out), "--shard-size", str(given.shard_size)]
    command += ["--height", str(size.height), "--width", str(size.width)]
    began = time.time()
    subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))})
    ended = sorted(shard.stat().st_mtime for shard in out.glob("*.tar"))
    records = read_manifest(out).records
    rate = (records - given.shard_size * count) / (ended[-1] - ended[count - 1])
    name = f"encode --engine ray, {len(gpus) or 'no'} GPU(s)"
    yield name, f"{rate:.1f} records/s between its first shards and its last, {records} records"
    yield f"{name}, whole command", f"{time.time() - began:.1f} s, first shard after {ended[0] - began:.1f} s"


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    for name, default in (("clips", 48), ("rows", 2048), ("shard-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    gpus = [] if given.tiny else list(range(torch.cuda.device_count()))
    device = torch.device("cuda" if gpus else "cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        write_model(work / "model", TRUE if gpus else TINY, device)
        torch.cuda.empty_cache()  # the workers need the room
        make_rows(work, given.clips, given.rows)
        for used in [gpus[:count] for count in (1, 2, 4, 8) if count <= max(1, len(gpus))]:
            for row in run(given, work, used):
                rows.append(row)
                print(*row, sep=": ", flush=True)
    if not given.tiny:
        append("encode_ray", rows, model="random weights of the true size")


if __name__ == "__main__":
    main()
