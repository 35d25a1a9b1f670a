"""N GPUs against one, by whole runs of the nano model: the same numbers, elastic resume, a killed rank.

    python -m benchmarks.ranks --gpus 2 [--device cpu] [--memory compact]

Every run takes the same global batch of random latents for the same iterations; several run at once. How far two
runs are apart is told against the noise of the precision: one GPU that takes the batch in other pieces.
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

from benchmarks.report import append
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
Row = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """A run: its processes one after the other, each (ranks, iterations to reach)."""

    name: str
    stages: tuple[tuple[int, int], ...]
    batch_size: int = 1
    replicate: int = 1
    die: int | None = None  # iteration in which a rank is killed


def make_data(folder: Path, spec: VideoSpec = SPEC) -> Path:
    """A data set of random latents and embeddings for the nano model."""
    folder.mkdir()
    draws = make_generator(0, 0, 0, "benchmark")

    def record(number: int) -> Record:
        text = torch.randn((6 + number % 20, TEXT_DIM), generator=draws)
        frame = torch.randn(spec.first_frame_shape, generator=draws)
        return Record(f"{number:09d}", RecordSource("a prompt", f"{number}.mp4", number + 2), frame, text)

    shard = write_shard(folder, shard_file_name(0), map(record, range(RECORDS)), failures=[], rows_sha256="").shard
    vae, text, tokenizer = (fingerprint_folder(MODEL / part) for part in ("vae", "text_encoder", "tokenizer"))
    encoder = EncoderInfo(vae, text, tokenizer, "float32", "bfloat16", TEXT_DIM, "")
    write_manifest(folder, Manifest(1, spec, encoder, (shard,), 0), torch.zeros(8, TEXT_DIM))
    return folder


def runs(gpus: int) -> list[Run]:
    """All that are compared; the first two are one GPU's."""
    full, half = ITERATIONS, gpus // 2
    return [
        Run("one GPU", ((1, full),)),
        Run("one GPU, two clips at once", ((1, full),), batch_size=2),
        Run(f"{gpus} GPUs", ((gpus, full),)),
        Run(f"{gpus} GPUs, each a whole copy (HSDP)", ((gpus, full),), replicate=gpus),
        Run(f"elastic {gpus} > {half} > {gpus}", ((gpus, 2), (half, 4), (gpus, full))),
        Run("one rank killed", ((gpus, full),), die=ITERATIONS - 1),
    ]


def make_config(run: Run, folder: Path, given: argparse.Namespace) -> DistillConfig:
    """A short run at rates at which the weights move."""
    out = folder / run.name.replace(" ", "-").replace(",", "").replace(">", "to")
    return DistillConfig(
        shards=(str(folder / "data"),), model=str(MODEL), out=str(out),
        num_frames=SPEC.num_frames, height=SPEC.height, width=SPEC.width, fps=SPEC.fps,
        student_update_interval=2, student_lr=5e-5, critic_lr=3e-4, ema_start=1000, max_text_tokens=32, checkpoint_every=SAVED,
        batch_size=run.batch_size, global_batch=4 * given.gpus, replicate=run.replicate,
        dtype="bfloat16", optimizer_form=given.memory, device=given.device, offload="all",
        activation_checkpointing="off", attention=given.attention,
    )  # fmt: skip


def do(run: Run, config: DistillConfig) -> float:
    """Make a run; its seconds. A killed rank must be started again by torchrun."""
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


def seen(out: Path) -> set[str]:
    """Every sample that was trained on, with its iteration and role."""
    return {line for path in out.glob("seen-*.txt") for line in path.read_text().splitlines()}


def losses(out: Path) -> torch.Tensor:
    """Of all iterations and roles."""
    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return torch.tensor([line[key] for line in lines for key in sorted(line) if key.endswith("loss")])


def moved(out: Path, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """How the student's average moved from where it began, in one vector."""
    average = {f"ema.{name}": torch.empty_like(value) for name, value in start.items()}
    load_checkpoint(newest_checkpoint(out), average)
    return torch.cat([(average[f"ema.{name}"] - value).flatten() for name, value in start.items()])


def compare(name: str, spent: float, out: Path, base: Path, start: dict[str, torch.Tensor]) -> Row:
    """One run against one GPU's."""
    same = "the same samples" if seen(out) == seen(base) else "OTHER SAMPLES"
    loss, wanted = losses(out), losses(base)
    off = ((loss - wanted).abs() / wanted).max() if len(loss) == len(wanted) else torch.tensor(torch.inf)
    way, right = moved(out, start), moved(base, start)
    far = (way - right).norm() / right.norm()
    starts = ", ".join((out / "starts.txt").read_text().split())
    return (
        name,
        f"started at {starts}, {same}, losses off by {off:.1e} at most, student's way by {far:.1e}, {spent:.0f} s",
    )


def first_weights() -> dict[str, torch.Tensor]:
    """The weights of the model folder, float32."""
    net = materialize_transformer(build_meta_transformer(MODEL, torch.float32), torch.device("cpu"))
    start = {name: value.detach() for name, value in net.named_parameters()}
    read_weights(MODEL / "transformer", start)
    return start


def measure(given: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All runs, so many at once."""
    make_data(folder / "data")
    first, *others = runs(given.gpus)
    todo = [first, *(run for run in others if any(word in run.name for word in given.only.split(",")))]
    configs = [make_config(run, folder, given) for run in todo]
    start, outs = first_weights(), [Path(config.out) for config in configs]
    with ThreadPoolExecutor(given.at_once) as pool:
        pending = [pool.submit(do, run, config) for run, config in zip(todo, configs, strict=True)]
        for run, out, spent in zip(todo, outs, pending, strict=True):
            failure = spent.exception()
            yield (run.name, str(failure)) if failure else compare(run.name, spent.result(), out, outs[0], start)


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", default="compact")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--only", default="", help="runs whose names have one of these words, and one GPU's")
    parser.add_argument("--at-once", type=int, default=6)
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        for row in measure(given, Path(made)):
            print(*row, sep=": ", flush=True)
            rows.append(row)
    if given.device == "cuda":
        append("ranks", rows, model="nano")


if __name__ == "__main__":
    main()
