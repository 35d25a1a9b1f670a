"""Small runs of the trainer for tests: random shards that fit the tiny model, one command to run them."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from common.model_folder import fingerprint_folder
from common.options import write_config
from common.seed import make_generator
from common.video import VideoSpec
from shards.manifest import EncoderInfo, make_manifest, sized_spec, write_manifest
from shards.record import Record, RecordSource
from shards.writer import shard_file_name, write_shard
from stage2_distill.config import DistillConfig
from stage2_distill.train import distill
from tests.forked import run_python
from tests.tiny_models import TEXT_DIM

ROOT = Path(__file__).parents[2]
SPEC = VideoSpec(num_frames=9, height=64, width=64, fps=8)


def make_shards(
    folder: Path,
    model: Path,
    *,
    records: int = 24,
    text_only: bool = False,
    change: Callable[[int, Record], Record] = lambda number, record: record,
    sizes: Sequence[tuple[int, int] | None] = (None,),
) -> Path:
    """A data set of random latents and embeddings, as the encoders of `model` would have made it.

    Shards of 8 records take turns with `sizes`, each (height, width) or None for that of `SPEC`.
    """
    folder.mkdir(parents=True)
    draws = make_generator(0, 0, 0, "test data")

    def record(number: int) -> Record:
        spec = sized_spec(SPEC, sizes[number // 8 % len(sizes)])
        frame = None if text_only else torch.randn(spec.first_frame_shape, generator=draws)
        text = 30 * torch.randn((4 + number % 5, TEXT_DIM), generator=draws)  # so that the text is heard
        source = RecordSource(f"prompt {number}", f"{number}.mp4", number + 2, size=(spec.height, spec.width))
        return Record(f"{number:09d}", source, frame, text)

    shards = []
    for n in range(records // 8):
        batch = [change(i, record(i)) for i in range(n * 8, n * 8 + 8)]
        size = sizes[n % len(sizes)]
        index = write_shard(folder, shard_file_name(n), batch, failures=[], rows_sha256="", video_size=size)
        shards.append(index.shard)
    prints = (fingerprint_folder(model / part) for part in ("vae", "text_encoder", "tokenizer"))
    encoder = EncoderInfo(*prints, "float32", "float32", TEXT_DIM, "bad")
    negative = torch.randn((3, TEXT_DIM), generator=draws).bfloat16()
    write_manifest(folder, make_manifest(SPEC, encoder, tuple(shards), 0), negative)
    return folder


def make_config(shards: Path, model: Path, out: Path, **changes: object) -> DistillConfig:
    """A few iterations in float32 with learning rates at which they can be told apart."""
    base = DistillConfig(
        shards=(str(shards),),
        model=str(model),
        out=str(out),
        iterations=6,
        num_frames=SPEC.num_frames,
        height=SPEC.height,
        width=SPEC.width,
        fps=SPEC.fps,
        student_lr=1e-3,
        critic_lr=1e-3,
        student_update_interval=2,
        ema_start=1,
        ema_decay=0.9,
        batch_size=2,
        global_batch=4,
        checkpoint_every=3,
        dtype="float32",
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


def run_here(config: DistillConfig) -> Path:
    """Run in this process; the newest checkpoint."""
    return distill(config)


def run_torchrun(command: list[str], world: int) -> subprocess.CompletedProcess[str]:
    """Run a script and its arguments under torchrun on `world` gloo processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def run_jobs(jobs: list[tuple[int, list[DistillConfig], dict[str, int]]], folder: Path) -> None:
    """Make runs on forked ranks: (ranks, configurations, what is to happen to them); see rank_worker.py."""
    written = []
    for number, (world, configs, events) in enumerate(jobs):
        files = [folder / f"{number}-{place}.yaml" for place in range(len(configs))]
        for file, config in zip(files, configs, strict=True):
            write_config(file, config)
        written.append({"world": world, "configs": [str(file) for file in files], **events})
    (folder / "jobs.json").write_text(json.dumps(written))
    done = run_python(Path(__file__).with_name("rank_worker.py"), folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]


def run_worker(configs: list[DistillConfig], world: int, folder: Path) -> list[Path]:
    """Make several runs on `world` forked ranks; their folders."""
    run_jobs([(world, configs, {})], folder)
    return [Path(config.out) for config in configs]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint written by one process."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {
        "student", "critic", "ema", "student_optimizer", "critic_optimizer"
    }  # fmt: skip
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
