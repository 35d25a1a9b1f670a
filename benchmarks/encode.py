"""Stage one: reading, then random encoders of the true size by precision and batch, then encode from end to end.

    python -m benchmarks.encode --reading                    (CPU: first frames only)
    python -m benchmarks.encode [--tiny] [--parts models,eager,idle,reference,compiled] [--clips 512] [--rows 1024]

The clips are made on the spot, the shards are written by `stage1_encode.pipeline.make_shards`."""

import argparse
import csv
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import clips
from benchmarks.models import (
    BATCHES,
    PRECISIONS,
    fresh,
    memory,
    of_text,
    of_vae,
    pictures,
    seconds,
    settle,
    some_text,
    vae_copy,
    vae_error,
)
from benchmarks.random_models import TINY, TRUE, WORDS, random_text, random_vae
from benchmarks.reading import reading, whole_clip
from benchmarks.report import append
from common.device import copy_async, pick_device
from common.video import TEXT_LENGTH, VideoSpec
from stage1_encode.config import EncodeConfig
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.pipeline import make_shards, prepare_encoders, start_readers, write_negative_embedding

READY = 4.0  # seconds in which the processes that read files are there
SOURCE = "tests/data/bigbuckbunny.mp4"
Row = tuple[str, str]


def show(rows: Iterator[Row]) -> list[Row]:
    """Print rows as they come."""
    made = []
    for row in rows:
        print(f"{row[0]:70} {row[1]}", flush=True)
        made.append(row)
    return made


def write_rows(folder: Path, paths: list[Path], count: int) -> Path:
    """A CSV of `count` rows with prompts of 30 to 150 tokens, the end token included."""
    table, draw = folder / "rows.csv", numpy.random.default_rng(0)
    lengths = draw.integers(29, 150, count)
    prompts = [" ".join(f"w{word}" for word in draw.integers(0, WORDS, length)) for length in lengths]
    with table.open("w", newline="") as file:
        rows = [(paths[row % len(paths)], prompt) for row, prompt in enumerate(prompts)]
        csv.writer(file).writerows([("video", "prompt"), *rows])
    return table


def alone(config: EncodeConfig, encoders: RowEncoder, pixels: Tensor) -> float:
    """Seconds that the two models alone take for the rows of a CSV, in the same batches, all inputs being there."""
    device, batches, count = encoders.vae.mean.device, [], 0
    for shard in read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False):
        tokens = text_encoder.tokenize_prompts(encoders.text, [text_encoder.clean_prompt(row.prompt) for row in shard])
        grouped = [
            [tokens[place] for place in batch]
            for batch in text_encoder.group_by_length(tokens, config.text_batch_tokens)
        ]
        batches += [tuple(copy_async(x, device) for x in text_encoder.pad_tokens(group, 0)) for group in grouped]
        count += len(shard)
    settle()
    began = time.perf_counter()
    with torch.no_grad():
        for ids, mask in batches:
            encoders.text.model(ids, mask)
    for _ in range(0, count, config.batch_size):
        vae.encode_frames(encoders.vae, pixels[: config.batch_size])
    settle()
    return time.perf_counter() - began


def from_end_to_end(config: EncodeConfig, encoders: RowEncoder, pixels: Tensor) -> Iterator[Row]:
    """Shards made by the product, against the models alone on the same batches in the same run."""
    write_negative_embedding(config, encoders)  # warms the text encoder up
    vae.encode_frames(encoders.vae, pixels[: config.batch_size])
    shards = dict(enumerate(read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False)))
    rows = sum(len(shard) for shard in shards.values())
    models = alone(config, encoders, pixels)
    memory()
    with closing(start_readers(config)) as readers:
        time.sleep(READY)  # a real run loads its models meanwhile
        began = time.perf_counter()
        made = [index for _, index in make_shards(config, encoders, readers, shards)]
        took = time.perf_counter() - began
    records, size = sum(index.shard.records for index in made), sum(index.shard.size for index in made)
    name = f"{config.vae_dtype}, batch {config.batch_size}{', compiled' if config.compile else ''}"
    yield f"both models alone, {name}", f"{rows / models:.1f} records/s"
    figure = f"{records / took:.1f} records/s ({records} of {rows} in {took:.1f} s, {size / took / 1e6:.0f} MB/s)"
    yield f"encode from end to end, {name}", f"{figure}, {models / took:.2f} of the models alone, {memory()}"


def idle(config: EncodeConfig, encoders: RowEncoder) -> Iterator[Row]:
    """Share of the time between the first and the last piece of GPU work in which the GPU did nothing."""
    gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    rows = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False)
    shards = dict(enumerate(islice(rows, 3)))
    with closing(start_readers(config)) as readers, profile(activities=[activity]) as seen:
        for _ in make_shards(config, encoders, readers, shards):
            pass
        settle()
    found = [event for event in seen.events() if not gpu or event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in found)
    busy, reached, longest = 0.0, spans[0][0], Counter[str]()
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    for event in found:
        longest[event.name] += event.time_range.end - event.time_range.start
    whole = reached - spans[0][0]
    yield "GPU idle share, 3 shards", f"{1 - busy / whole:.1%} of {whole / 1e6:.1f} s"
    for name, took in longest.most_common(14):
        print(f"    {took / busy:6.1%}  {name[:100]}", flush=True)


def reference(
    config: EncodeConfig, base: vae.WanVae, encoder: text_encoder.TextEncoder, paths: list[Path]
) -> Iterator[Row]:
    """The reference's way: the whole clip decoded and stretched, the prompt padded to 512, one sample at a time."""
    device = base.mean.device
    ids = torch.randint(3, WORDS, (1, TEXT_LENGTH), device=device)

    def sample(path: Path) -> None:
        first = whole_clip(str(path), config.spec)[:, :1].to(device)
        with torch.inference_mode():
            base.model.encode(first[None]).latent_dist.mode().cpu()
            encoder.model(ids, torch.ones_like(ids)).last_hidden_state.cpu()

    sample(paths[0])
    began = time.perf_counter()
    for path in paths[1:4]:
        sample(path)
    took = (time.perf_counter() - began) / 3
    yield "the reference's way, one sample at a time", f"{1 / took:.2f} records/s"


def make_config(work: Path, table: Path, given: argparse.Namespace, name: str, **options: object) -> EncodeConfig:
    """An encode into a folder of its own."""
    size = TINY if given.tiny else TRUE
    (work / name).mkdir()
    return EncodeConfig(
        str(table), "random", str(work / name), height=size.height, width=size.width,
        shard_size=given.shard_size, **options,
    )  # fmt: skip


def measure(given: argparse.Namespace, work: Path, began: float) -> Iterator[Row]:
    """All parts, the most important first."""
    size, device = TINY if given.tiny else TRUE, pick_device("auto")
    (work / "clips").mkdir()
    makers = clips.start(SOURCE, work / "clips", given.clips, max(1, (os.cpu_count() or 2) - 2))
    paths = [clips.clip_path(work / "clips", number) for number in range(given.clips)]
    table = write_rows(work, paths, given.rows)
    base, encoder = random_vae(size, device), random_text(size, device)
    pixels = pictures(size, max(BATCHES), device)
    settle()
    yield "random models made after", f"{time.perf_counter() - began:.1f} s, {memory()}"
    if "models" in given.parts:
        yield from of_vae(base, pixels, given.precisions.split(","))
    exact = some_text(encoder)
    encoder.model.bfloat16()
    memory()
    if "models" in given.parts:
        yield from of_text(encoder, "bfloat16", exact)
    wait_for(makers)
    yield "clips made after", f"{time.perf_counter() - began:.1f} s"
    if "eager" in given.parts:
        config = make_config(work, table, given, "eager", vae_dtype=given.vae_dtype)
        encoders = RowEncoder(fresh(base, config.vae_dtype), encoder)
        yield from from_end_to_end(config, encoders, pixels)
    if "idle" in given.parts:
        encoders = RowEncoder(fresh(base, given.vae_dtype), encoder)
        yield from idle(make_config(work, table, given, "idle", vae_dtype=given.vae_dtype), encoders)
    if "reference" in given.parts:
        yield from reference(make_config(work, table, given, "reference"), base, encoder, paths)
    if "compiled" in given.parts:
        left = began + given.budget
        for precision in given.compiled.split(","):
            config = make_config(work, table, given, precision, vae_dtype=precision, compile=True)
            yield from compiled(config, base, encoder, pixels, exact, left)


def compiled(
    config: EncodeConfig,
    base: vae.WanVae,
    encoder: text_encoder.TextEncoder,
    pixels: Tensor,
    exact: Tensor,
    until: float,
) -> Iterator[Row]:
    """Both models compiled, each alone, then from end to end; nothing is begun after `until`."""
    start, size = time.perf_counter(), config.batch_size
    if start > until:
        return
    encoders = prepare_encoders(config, vae_copy(base, config.vae_dtype), encoder)
    yield from of_text(encoders.text, "bfloat16, compiled", exact)
    yield "compiling the text encoder took", f"{time.perf_counter() - start:.1f} s"
    start = time.perf_counter()
    took = seconds(lambda: vae.encode_frames(encoders.vae, pixels[:size])) / size
    error = vae_error(encoders.vae, base, pixels[:size])
    figure = f"{took * 1e3:.2f} ms a frame, {memory()}, latents off by {error:.1e}"
    yield f"VAE, one frame, here, {config.vae_dtype}, compiled, batch {size}", figure
    yield "compiling the VAE took", f"{time.perf_counter() - start:.1f} s"
    if time.perf_counter() < until:
        yield from from_end_to_end(config, encoders, pixels)


def wait_for(makers: list["subprocess.Popen[bytes]"]) -> None:
    """Until the clips are made."""
    assert all(maker.wait() == 0 for maker in makers), "the clips cannot be made"


def main() -> None:
    """Measure, print and append to the results."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", action="store_true", help="only read files, which needs no GPU")
    parser.add_argument(
        "--parts", default="models,eager,idle,reference,compiled", help="which parts, separated by commas"
    )
    parser.add_argument("--tiny", action="store_true", help="small models, for trying this script")
    for name, default in (("clips", 512), ("rows", 1024), ("shard-size", 256), ("budget", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of the VAE, for the part models")
    parser.add_argument("--vae-dtype", default="tf32", choices=PRECISIONS)
    parser.add_argument("--compiled", default="float16", help="precisions to compile, separated by commas")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows = show(reading(SOURCE, VideoSpec(), folder) if given.reading else measure(given, folder, began))
    if not given.tiny:
        append("encode", rows, model="none" if given.reading else "random weights of the true size")


if __name__ == "__main__":
    main()
