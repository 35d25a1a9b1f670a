"""N GPUs against one, by complete runs of the nano model: the same numbers, elastic resume, a killed rank.

    python -m benchmarks.ranks --gpus 2 [--device cpu] [--memory compact] [--only WORD,WORD] [--at-once 6]

Every run takes the same global batch of random latents for the same iterations; several run at the same time. The scale
for differences between runs is the noise of the precision: one GPU with another batch size. --only takes words from the
names of runs; the first run of one GPU is always included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.runner import Row, parse_arguments, run_benchmark
from common.model_folder import fingerprint_folder
from common.options import write_config
from common.seed import make_generator
from common.video import VideoSpec
from shards.manifest import EncoderInfo, Manifest, write_manifest
from shards.record import Record, RecordSource
from shards.writer import shard_file_name, write_shard
from stage2_distill.checkpointing.format import load_checkpoint, newest_checkpoint
from stage2_distill.config import DistillConfig
from stage2_distill.model.wan import build_meta_transformer, materialize_transformer
from stage2_distill.model.weight_loading import read_weights
from stage2_distill.monitoring.metrics_log import METRICS_FILE

ROOT = Path(__file__).parent.parent
MODEL, SPEC, TEXT_DIM = ROOT / "examples/nano/model", VideoSpec(17, 64, 96, 12), 64
ITERATIONS, SAVED, RECORDS = 6, 2, 64


@dataclass(frozen=True)
class Run:
    """A run: its stages one after another, each (ranks, iterations to reach)."""

    name: str
    stages: tuple[tuple[int, int], ...]
    batch_size: int = 1
    replicate: int = 1
    die: int | None = None  # iteration in which a rank is killed


def make_data(folder: Path, spec: VideoSpec = SPEC) -> Path:
    """Write a data set of random latents and embeddings for the nano model."""
    folder.mkdir()
    generator = make_generator(0, 0, 0, "benchmark")

    def random_record(number: int) -> Record:
        text = torch.randn((6 + number % 20, TEXT_DIM), generator=generator)
        frame = torch.randn(spec.first_frame_shape, generator=generator)
        return Record(f"{number:09d}", RecordSource("a prompt", f"{number}.mp4", number + 2), frame, text)

    records = map(random_record, range(RECORDS))
    shard = write_shard(folder, shard_file_name(0), records, failures=[], rows_sha256="").shard
    vae, text, tokenizer = (fingerprint_folder(MODEL / part) for part in ("vae", "text_encoder", "tokenizer"))
    encoder = EncoderInfo(vae, text, tokenizer, "float32", "bfloat16", TEXT_DIM, "")
    write_manifest(folder, Manifest(1, spec, encoder, (shard,), 0), torch.zeros(8, TEXT_DIM))
    return folder


def make_runs(gpus: int) -> list[Run]:
    """Return all runs that are compared; the first two take one GPU."""
    full, half = ITERATIONS, gpus // 2
    return [
        Run("one GPU", ((1, full),)),
        Run("one GPU, two clips at once", ((1, full),), batch_size=2),
        Run(f"{gpus} GPUs", ((gpus, full),)),
        Run(f"{gpus} GPUs, a complete copy on each (HSDP)", ((gpus, full),), replicate=gpus),
        Run(f"elastic {gpus} > {half} > {gpus}", ((gpus, 2), (half, 4), (gpus, full))),
        Run("one rank killed", ((gpus, full),), die=ITERATIONS - 1),
    ]


def make_config(run: Run, folder: Path, options: argparse.Namespace) -> DistillConfig:
    """Return a short run at learning rates at which the weights move."""
    out = folder / run.name.replace(" ", "-").replace(",", "").replace(">", "to")
    return DistillConfig(
        shards=(str(folder / "data"),), model=str(MODEL), out=str(out),
        num_frames=SPEC.num_frames, height=SPEC.height, width=SPEC.width, fps=SPEC.fps,
        student_update_interval=2, student_lr=5e-5, critic_lr=3e-4, ema_start=1000, max_text_tokens=32,
        checkpoint_every=SAVED,
        batch_size=run.batch_size, global_batch=4 * options.gpus, replicate=run.replicate,
        dtype="bfloat16", optimizer_form=options.memory, device=options.device, offload="all",
        activation_checkpointing="off", attention=options.attention,
    )  # fmt: skip


def run_stages(run: Run, config: DistillConfig) -> float:
    """Run all stages and return the seconds. A killed rank must be restarted by torchrun."""
    began = time.perf_counter()
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    for ranks, iterations in run.stages:
        file = Path(f"{config.out}.yaml")
        write_config(file, replace(config, iterations=iterations))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", "1" if run.die is not None else "0", "-m", "benchmarks.witness", str(file)]
        command += [] if run.die is None else ["--die", str(run.die)]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(f"    {run.name}: {ranks} ranks, {time.perf_counter() - start:.0f} s, code {done.returncode}", flush=True)
        if done.returncode:
            raise RuntimeError(f"{run.name}, {ranks} ranks: {done.stderr[-4000:]}")
    assert run.die is None or (Path(config.out) / "killed").exists()
    return time.perf_counter() - began


def read_samples(out: Path) -> set[str]:
    """Return every sample of training, with its iteration and role."""
    return {line for path in out.glob("seen-*.txt") for line in path.read_text().splitlines()}


def read_losses(out: Path) -> torch.Tensor:
    """Return the losses of all iterations and roles."""
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return torch.tensor([line[key] for line in lines for key in sorted(line) if key.endswith("loss")])


def weight_change(out: Path, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the difference of the EMA student from its start, as one vector."""
    average = {f"ema.{name}": torch.empty_like(value) for name, value in start.items()}
    load_checkpoint(newest_checkpoint(out), average)
    return torch.cat([(average[f"ema.{name}"] - value).flatten() for name, value in start.items()])


def compare_runs(name: str, seconds: float, out: Path, base: Path, start: dict[str, torch.Tensor]) -> Row:
    """Compare one run with that of one GPU."""
    same = "the same samples" if read_samples(out) == read_samples(base) else "OTHER SAMPLES"
    loss, wanted = read_losses(out), read_losses(base)
    error = ((loss - wanted).abs() / wanted).max() if len(loss) == len(wanted) else torch.tensor(torch.inf)
    change, expected = weight_change(out, start), weight_change(base, start)
    weight_error = (change - expected).norm() / expected.norm()
    starts = ", ".join((out / "starts.txt").read_text().split())
    errors = f"losses off by {error:.1e} at most, change of the student by {weight_error:.1e}"
    return name, f"started at {starts}, {same}, {errors}, {seconds:.0f} s"


def first_weights() -> dict[str, torch.Tensor]:
    """Return the weights of the model folder in float32."""
    net = materialize_transformer(build_meta_transformer(MODEL, torch.float32), torch.device("cpu"))
    start = {name: value.detach() for name, value in net.named_parameters()}
    read_weights(MODEL / "transformer", start)
    return start


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Run everything, `--at-once` runs at the same time."""
    make_data(folder / "data")
    first, *others = make_runs(options.gpus)
    selected = [first, *(run for run in others if any(word in run.name for word in options.only.split(",")))]
    configs = [make_config(run, folder, options) for run in selected]
    start, outs = first_weights(), [Path(config.out) for config in configs]
    with ThreadPoolExecutor(options.at_once) as pool:
        pending = [pool.submit(run_stages, run, config) for run, config in zip(selected, configs, strict=True)]
        for run, out, future in zip(selected, outs, pending, strict=True):
            failure = future.exception()
            if failure:
                yield run.name, str(failure)
            else:
                yield compare_runs(run.name, future.result(), out, outs[0], start)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, gpus=2, device="cuda", memory="compact", attention="auto", only="", at_once=6)
    with tempfile.TemporaryDirectory() as folder:
        run_benchmark("ranks", measure(options, Path(folder)), keep=options.device == "cuda", model="nano")


if __name__ == "__main__":
    main()
