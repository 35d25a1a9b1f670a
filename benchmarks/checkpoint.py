"""How long training waits for a checkpoint, and how fast it is written: synthetic state of --gib on one device.

    python -m benchmarks.checkpoint [--gib 8] [--device auto] [--folder FOLDER]

The peer is torch.save of the same tensors, during which training waits. --folder is on the disk to be measured; without
it a temporary folder is used. Nothing is appended to the results.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.runner import Row, parse_arguments, run_benchmark
from common.video import VideoSpec
from stage2_distill.checkpointing.format import StudentFacts, checkpoint_damage, list_checkpoints, load_checkpoint
from stage2_distill.checkpointing.writer import CheckpointOptions, CheckpointWriter
from stage2_distill.distributed.process_group import start_process_group

TENSOR_BYTES = 64 << 20


def random_state(gib: float, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random float32 tensors of `gib` GiB together."""
    count = max(1, int(gib * 2**30) // TENSOR_BYTES)
    return {f"student.{n}": torch.randn(TENSOR_BYTES // 4096, 1024, device=device) for n in range(count)}


def time_products(device: torch.device) -> float:
    """Return the seconds of some work on the device, as training does beside the writing."""
    size = 8192 if device.type == "cuda" else 512
    product = torch.randn(size, size, device=device)
    began = time.perf_counter()
    for _ in range(50):
        product = (product @ product).clamp(-1, 1)
    product.sum().item()
    return time.perf_counter() - began


def format_rate(seconds: float, gigabytes: float, note: str = "") -> str:
    """Return seconds and GB/s as text."""
    return f"{seconds:10.3f} s ({gigabytes / seconds:.2f} GB/s{note})"


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measure writing beside work on the device, reading, and torch.save."""
    ranks = start_process_group(options.device)
    tensors = random_state(options.gib, ranks.device)
    size = sum(value.nbytes for value in tensors.values()) / 1e9
    checkpoint_options = CheckpointOptions(async_checkpoint=True, keep_last=3, keep_every=0)
    facts = StudentFacts(1, (1000.0,), 5.0, "renoise", VideoSpec(5, 32, 32, 8), "", "", "", "", {})
    time_products(ranks.device)
    alone = time_products(ranks.device)
    yield "state", f"{size:10.3f} GB"
    with CheckpointWriter(folder, checkpoint_options, ranks) as writer:
        began = time.perf_counter()
        writer.prepare_buffers(tensors).result()
        yield "room for copies, once in a run, beside training", format_rate(time.perf_counter() - began, size)
        began = time.perf_counter()
        writer.save(tensors, facts)
        writer.wait_for_copies()
        pause = time.perf_counter() - began
        yield "training waits", format_rate(pause, size)
        yield "products beside the writing", f"{time_products(ranks.device) / alone:10.3f} times their time alone"
        writer.finish()
        total = time.perf_counter() - began
    yield "until it has its name", format_rate(total, size, " written, read back, hashed")
    (checkpoint,) = list_checkpoints(folder)
    began = time.perf_counter()
    assert checkpoint_damage(checkpoint) is None
    yield "check before resuming", format_rate(time.perf_counter() - began, size)
    began = time.perf_counter()
    load_checkpoint(checkpoint, tensors)
    yield "load", format_rate(time.perf_counter() - began, size)
    began = time.perf_counter()
    torch.save(tensors, folder / "peer.pt")
    peer = time.perf_counter() - began
    yield "training waits for torch.save", f"{peer:10.3f} s (ours is {peer / pause:.1f} times shorter)"


def main() -> None:
    """Measure and print."""
    options = parse_arguments(__doc__, gib=8.0, device="auto", folder=str)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run_benchmark("checkpoint", measure(options, Path(folder)), keep=False, layout="{:32}{}")


if __name__ == "__main__":
    main()
