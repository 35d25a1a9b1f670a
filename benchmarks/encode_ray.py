"""`encode --engine ray` as a user runs it: on one GPU, two, four, as many as there are; one run each, with own shards.

    python -m benchmarks.encode_ray [--tiny] [--rows 2048] [--shard-size 64] [--clips 48]

A model folder of random encoders of the true size is written first; --rows is what each GPU encodes, in all cases.
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

from benchmarks.encode import start_clips, wait_for_clips, write_rows
from benchmarks.random_models import TINY, TRUE, Size, autoencoder, random_text_encoder
from benchmarks.runner import RANDOM_WEIGHTS, Row, parse_arguments, run_benchmark
from shards.manifest import read_manifest


def write_model(folder: Path, size: Size, device: torch.device) -> None:
    """Write a model folder: VAE with a small decoder, text encoder in bf16 and tokenizer."""
    torch.manual_seed(0)
    autoencoder(size, device, decoder=8).save_pretrained(folder / "vae")
    encoder = random_text_encoder(size, device)
    encoder.model.bfloat16().save_pretrained(folder / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "tokenizer")


def run_command(options: argparse.Namespace, folder: Path, paths: list[Path], gpus: list[int]) -> Iterator[Row]:
    """Run the command once; its rate is that between the first shards and the last."""
    out, size, count = folder / f"out-{len(gpus)}", TINY if options.tiny else TRUE, max(1, len(gpus))
    table = write_rows(folder, paths, options.rows * count)
    command = [sys.executable, "cli.py", "encode", "--engine", "ray", "--data", str(table)]
    command += ["--model", str(folder / "model"), "--out", str(out), "--shard-size", str(options.shard_size)]
    command += ["--height", str(size.height), "--width", str(size.width)]
    began = time.time()
    subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))})
    ended = sorted(shard.stat().st_mtime for shard in out.glob("*.tar"))
    records = read_manifest(out).records
    rate = (records - options.shard_size * count) / (ended[-1] - ended[count - 1])
    name = f"encode --engine ray, {len(gpus) or 'no'} GPU(s)"
    yield name, f"{rate:.1f} records/s between its first shards and its last, {records} records"
    yield f"{name}, whole command", f"{time.time() - began:.1f} s, first shard after {ended[0] - began:.1f} s"


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Run the command on one GPU, two, four and eight, as far as there are so many."""
    gpus = [] if options.tiny else list(range(torch.cuda.device_count()))
    write_model(folder / "model", TRUE if gpus else TINY, torch.device("cuda" if gpus else "cpu"))
    torch.cuda.empty_cache()  # the workers need the room
    makers, paths = start_clips(folder, options.clips)
    wait_for_clips(makers)
    for used in [gpus[:count] for count in (1, 2, 4, 8) if count <= max(1, len(gpus))]:
        yield from run_command(options, folder, paths, used)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, clips=48, rows=2048, shard_size=64)
    with tempfile.TemporaryDirectory() as folder:
        run_benchmark("encode_ray", measure(options, Path(folder)), keep=not options.tiny, model=RANDOM_WEIGHTS)


if __name__ == "__main__":
    main()
