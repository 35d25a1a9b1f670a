"""How long training waits for a checkpoint, and how fast it is written: synthetic state of --gib on one device.

`python -m benchmarks.checkpoint --gib 8`; the peer is torch.save of the same tensors, during which training waits.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common.video import VideoSpec
from stage2_distill.checkpointing.format import StudentFacts, checkpoint_damage, list_checkpoints, load_checkpoint
from stage2_distill.checkpointing.writer import CheckpointOptions, CheckpointWriter
from stage2_distill.distributed.process_group import RankContext, start_process_group

TENSOR = 64 << 20  # bytes


def state(gib: float, device: torch.device) -> dict[str, torch.Tensor]:
    """Random float32 tensors of `gib` in all."""
    count = max(1, int(gib * 2**30) // TENSOR)
    return {f"student.{n}": torch.randn(TENSOR // 4096, 1024, device=device) for n in range(count)}


def matmuls(device: torch.device) -> float:
    """Seconds of some work on the device, as training does beside the writing."""
    size = 8192 if device.type == "cuda" else 512
    one = torch.randn(size, size, device=device)
    began = time.perf_counter()
    for _ in range(50):
        one = (one @ one).clamp(-1, 1)
    one.sum().item()
    return time.perf_counter() - began


def measure(gib: float, ranks: RankContext, folder: Path) -> Iterator[tuple[str, float, str]]:
    """Name, figure and unit of everything, each as soon as it is known."""
    tensors = state(gib, ranks.device)
    size = sum(value.nbytes for value in tensors.values()) / 1e9
    options = CheckpointOptions(async_checkpoint=True, keep_last=3, keep_every=0)
    facts = StudentFacts(1, (1000.0,), 5.0, "renoise", VideoSpec(5, 32, 32, 8), "", "", "", "", {})
    matmuls(ranks.device)
    alone = matmuls(ranks.device)
    yield "state", size, "GB"
    with CheckpointWriter(folder, options, ranks) as saver:
        began = time.perf_counter()
        saver.prepare_buffers(tensors).result()
        room = time.perf_counter() - began
        yield "room for copies, once in a run, beside training", room, f"s ({size / room:.1f} GB/s)"
        began = time.perf_counter()
        saver.save(tensors, facts)
        saver.wait_for_copies()
        pause = time.perf_counter() - began
        yield "training waits", pause, f"s ({size / pause:.1f} GB/s)"
        beside = matmuls(ranks.device)
        yield "products beside the writing", beside / alone, "times their time alone"
        saver.finish()
        whole = time.perf_counter() - began
    yield "until it has its name", whole, f"s ({size / whole:.2f} GB/s written, read back, hashed)"
    began = time.perf_counter()
    assert checkpoint_damage(list_checkpoints(folder)[0]) is None
    checked = time.perf_counter() - began
    yield "check before resuming", checked, f"s ({size / checked:.2f} GB/s)"
    began = time.perf_counter()
    load_checkpoint(list_checkpoints(folder)[0], tensors)
    loaded = time.perf_counter() - began
    yield "load", loaded, f"s ({size / loaded:.2f} GB/s)"
    began = time.perf_counter()
    torch.save(tensors, folder / "peer.pt")
    peer = time.perf_counter() - began
    yield "training waits for torch.save", peer, f"s (ours is {peer / pause:.1f} times shorter)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", default=None, help="On the disk to be measured; without it a temporary folder.")
    given = parser.parse_args()
    ranks = start_process_group(given.device)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for name, figure, unit in measure(given.gib, ranks, Path(folder)):
            print(f"{name:32}{figure:10.3f} {unit}", flush=True)


if __name__ == "__main__":
    main()
