"""Stage one: reading, then random encoders of the true size by precision and batch, then encode from end to end.

    python -m benchmarks.encode --reading                    (CPU: first frames only)
    python -m benchmarks.encode [--tiny] [--parts models,eager,idle,reference,compiled] [--clips 512] [--rows 1024]

--precisions: of the VAE in the part models. --compiled: precisions to compile, none of them after --budget seconds.
The clips are made by the script, the shards are written by `stage1_encode.pipeline.make_shards`.
"""

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
    copy_vae,
    make_frame_encoder,
    make_pictures,
    sample_embeddings,
    text_rows,
    vae_error,
    vae_rows,
)
from benchmarks.random_models import TINY, TRUE, WORDS, random_text_encoder, random_vae
from benchmarks.reading import read_whole_clip, reading_rows
from benchmarks.runner import RANDOM_WEIGHTS, Row, parse_arguments, peak_text, run_benchmark, sync, time_call
from common.device import copy_async, pick_device
from common.video import TEXT_LENGTH, VideoSpec
from stage1_encode.config import EncodeConfig
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import text_encoder, vae
from stage1_encode.models.row_encoder import RowEncoder
from stage1_encode.pipeline import make_shards, prepare_encoders, start_readers, write_negative_embedding

READER_START = 4.0  # seconds until the reader processes are ready; a real run loads its models meanwhile
SOURCE = "tests/data/bigbuckbunny.mp4"


def write_rows(folder: Path, paths: list[Path], count: int) -> Path:
    """Write a CSV of `count` rows with prompts of 30 to 150 tokens, the end token included."""
    table, draw = folder / "rows.csv", numpy.random.default_rng(0)
    lengths = draw.integers(29, 150, count)
    prompts = [" ".join(f"w{word}" for word in draw.integers(0, WORDS, length)) for length in lengths]
    with table.open("w", newline="") as file:
        rows = [(paths[row % len(paths)], prompt) for row, prompt in enumerate(prompts)]
        csv.writer(file).writerows([("video", "prompt"), *rows])
    return table


def start_clips(folder: Path, count: int) -> tuple[list["subprocess.Popen[bytes]"], list[Path]]:
    """Start to make clips in FOLDER/clips; returns the processes and the paths."""
    clip_folder = folder / "clips"
    clip_folder.mkdir()
    makers = clips.start_processes(SOURCE, clip_folder, count, max(1, (os.cpu_count() or 2) - 2))
    return makers, [clips.clip_path(clip_folder, number) for number in range(count)]


def wait_for_clips(makers: list["subprocess.Popen[bytes]"]) -> None:
    """Wait until the clips are made."""
    assert all(maker.wait() == 0 for maker in makers), "the clips cannot be made"


def time_models_alone(config: EncodeConfig, encoders: RowEncoder, pixels: Tensor) -> float:
    """Return the seconds that the two models take for the rows of a CSV, in the same batches, with inputs ready."""
    device, batches, count = encoders.vae.mean.device, [], 0
    for shard in read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False):
        tokens = text_encoder.tokenize_prompts(encoders.text, [text_encoder.clean_prompt(row.prompt) for row in shard])
        for batch in text_encoder.group_by_length(tokens, config.text_batch_tokens):
            padded = text_encoder.pad_tokens([tokens[index] for index in batch], 0)
            batches.append([copy_async(x, device) for x in padded])
        count += len(shard)
    began = sync()
    with torch.no_grad():
        for ids, mask in batches:
            encoders.text.model(ids, mask)
    for _ in range(0, count, config.batch_size):
        vae.encode_frames(encoders.vae, pixels[: config.batch_size])
    return sync() - began


def end_to_end_rows(config: EncodeConfig, encoders: RowEncoder, pixels: Tensor) -> Iterator[Row]:
    """Time the product's shards against the models alone on the same batches in the same run."""
    write_negative_embedding(config, encoders)  # warms the text encoder up
    vae.encode_frames(encoders.vae, pixels[: config.batch_size])
    shards = dict(enumerate(read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False)))
    rows = sum(len(shard) for shard in shards.values())
    models = time_models_alone(config, encoders, pixels)
    peak_text()
    with closing(start_readers(config)) as readers:
        time.sleep(READER_START)
        began = time.perf_counter()
        made = [index for _, index in make_shards(config, encoders, readers, shards)]
        took = time.perf_counter() - began
    records, size = sum(index.shard.records for index in made), sum(index.shard.size for index in made)
    name = f"{config.vae_dtype}, batch {config.batch_size}{', compiled' if config.compile else ''}"
    yield f"both models alone, {name}", f"{rows / models:.1f} records/s"
    figure = f"{records / took:.1f} records/s ({records} of {rows} in {took:.1f} s, {size / took / 1e6:.0f} MB/s)"
    yield f"encode from end to end, {name}", f"{figure}, {models / took:.2f} of the models alone, {peak_text()}"


def idle_rows(config: EncodeConfig, encoders: RowEncoder) -> Iterator[Row]:
    """Measure for how much of the time between its first and its last work the GPU was idle."""
    gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    rows = read_shard_rows(Path(config.data), shard_size=config.shard_size, text_only=False)
    shards = dict(enumerate(islice(rows, 3)))
    with closing(start_readers(config)) as readers, profile(activities=[activity]) as profiler:
        for _ in make_shards(config, encoders, readers, shards):
            pass
        sync()
    events = [event for event in profiler.events() if not gpu or event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached, kernels = 0.0, spans[0][0], Counter[str]()
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    for event in events:
        kernels[event.name] += event.time_range.end - event.time_range.start
    whole = reached - spans[0][0]
    yield "GPU idle share, 3 shards", f"{1 - busy / whole:.1%} of {whole / 1e6:.1f} s"
    for name, took in kernels.most_common(14):
        print(f"    {took / busy:6.1%}  {name[:100]}", flush=True)


def reference_rows(
    config: EncodeConfig, base: vae.WanVae, encoder: text_encoder.TextEncoder, paths: list[Path]
) -> Iterator[Row]:
    """Time the reference's way: the whole clip decoded and stretched, the prompt padded to 512, sample by sample."""
    device = base.mean.device
    ids = torch.randint(3, WORDS, (1, TEXT_LENGTH), device=device)

    def encode_sample(path: Path) -> None:
        first = read_whole_clip(str(path), config.spec)[:, :1].to(device)
        with torch.inference_mode():
            base.model.encode(first[None]).latent_dist.mode().cpu()
            encoder.model(ids, torch.ones_like(ids)).last_hidden_state.cpu()

    encode_sample(paths[0])
    began = time.perf_counter()
    for path in paths[1:4]:
        encode_sample(path)
    took = (time.perf_counter() - began) / 3
    yield "the reference's way, one sample at a time", f"{1 / took:.2f} records/s"


def make_config(options: argparse.Namespace, table: Path, out: Path, **changes: object) -> EncodeConfig:
    """Return the configuration of an encode into a new folder."""
    size = TINY if options.tiny else TRUE
    out.mkdir()
    return EncodeConfig(
        str(table), "random", str(out), height=size.height, width=size.width, shard_size=options.shard_size, **changes
    )


def measure(options: argparse.Namespace, folder: Path, began: float) -> Iterator[Row]:
    """Measure all parts, the most important first."""
    size, device = TINY if options.tiny else TRUE, pick_device("auto")
    makers, paths = start_clips(folder, options.clips)
    table = write_rows(folder, paths, options.rows)
    base, encoder = random_vae(size, device), random_text_encoder(size, device)
    pixels = make_pictures(size, max(BATCHES), device)
    yield "random models made after", f"{sync() - began:.1f} s, {peak_text()}"
    if "models" in options.parts:
        yield from vae_rows(base, pixels, options.precisions.split(","))
    exact = sample_embeddings(encoder)
    encoder.model.bfloat16()
    peak_text()
    if "models" in options.parts:
        yield from text_rows(encoder, "bfloat16", exact)
    wait_for_clips(makers)
    yield "clips made after", f"{time.perf_counter() - began:.1f} s"
    if "eager" in options.parts:
        config = make_config(options, table, folder / "eager", vae_dtype=options.vae_dtype)
        encoders = RowEncoder(make_frame_encoder(base, config.vae_dtype), encoder)
        yield from end_to_end_rows(config, encoders, pixels)
    if "idle" in options.parts:
        encoders = RowEncoder(make_frame_encoder(base, options.vae_dtype), encoder)
        yield from idle_rows(make_config(options, table, folder / "idle", vae_dtype=options.vae_dtype), encoders)
    if "reference" in options.parts:
        yield from reference_rows(make_config(options, table, folder / "reference"), base, encoder, paths)
    for precision in options.compiled.split(",") if "compiled" in options.parts else ():
        config = make_config(options, table, folder / precision, vae_dtype=precision, compile=True)
        yield from compiled_rows(config, base, encoder, pixels, exact, began + options.budget)


def compiled_rows(
    config: EncodeConfig,
    base: vae.WanVae,
    encoder: text_encoder.TextEncoder,
    pixels: Tensor,
    exact: Tensor,
    deadline: float,
) -> Iterator[Row]:
    """Time both models compiled, each alone, then from end to end; nothing is begun after the deadline."""
    start, size = time.perf_counter(), config.batch_size
    if start > deadline:
        return
    encoders = prepare_encoders(config, copy_vae(base, config.vae_dtype), encoder)
    yield from text_rows(encoders.text, "bfloat16, compiled", exact)
    yield "compiling the text encoder took", f"{time.perf_counter() - start:.1f} s"
    start = time.perf_counter()
    took = time_call(lambda: vae.encode_frames(encoders.vae, pixels[:size]), choose=min) / size
    error = vae_error(encoders.vae, base, pixels[:size])
    figure = f"{took * 1e3:.2f} ms a frame, {peak_text()}, latents off by {error:.1e}"
    yield f"VAE, one frame, here, {config.vae_dtype}, compiled, batch {size}", figure
    yield "compiling the VAE took", f"{time.perf_counter() - start:.1f} s"
    if time.perf_counter() < deadline:
        yield from end_to_end_rows(config, encoders, pixels)


def main() -> None:
    """Measure, print and append to the results."""
    began = time.perf_counter()
    options = parse_arguments(
        __doc__, tiny=False, reading=False, parts="models,eager,idle,reference,compiled", clips=512, rows=1024,
        shard_size=256, budget=100, precisions=",".join(PRECISIONS), vae_dtype="tf32", compiled="float16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reading = reading_rows(SOURCE, VideoSpec(), folder)
        rows = reading if options.reading else measure(options, folder, began)
        model = "none" if options.reading else RANDOM_WEIGHTS
        run_benchmark("encode", rows, keep=not options.tiny, model=model, layout="{:70} {}")


if __name__ == "__main__":
    main()
