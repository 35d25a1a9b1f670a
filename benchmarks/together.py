"""Denoising one video on several GPUs against one, with the same latents.

    torchrun --nproc-per-node 2 -m benchmarks.together [--tiny] [--repeats 5]

Random weights at 121 x 704 x 1280 in bfloat16 with compiled blocks; --tiny is a small model on the CPU. Every rank also
makes the whole video alone, at the same time as the others. Prints figures as they are known and appends them to
benchmarks/results/.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.random_models import make_student
from benchmarks.report import append
from common.condition import Condition
from common.video import TEXT_LENGTH, VideoSpec
from stage2_distill.network import Plan
from stage2_distill.parallel import start
from stage2_distill.sample import Student


def settle(device: torch.device) -> float:
    """The time, once all ranks have done their work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


def conditions(student: Student) -> Condition:
    """Random ones, the same on all ranks."""
    draws = torch.Generator(student.device).manual_seed(1)
    options = {"device": student.device, "generator": draws, "dtype": torch.float32}
    frame = torch.randn(1, *student.spec.first_frame_shape, **options)
    text = torch.randn(1, TEXT_LENGTH, student.net.config.text_dim, **options)
    return Condition(frame.bfloat16(), text.bfloat16())


def make(student: Student, plan: Plan, repeats: int) -> tuple[float, float, Tensor]:
    """Seconds of the first video, the median of those after it, and its latents."""
    for block in student.net.blocks:
        block.plan = plan
    condition, found = conditions(student), []
    for _ in range(1 + repeats):
        began = settle(student.device)
        x0 = student.denoise(condition, [0], 0)
        found.append(settle(student.device) - began)
    return found[0], statistics.median(found[1:]), x0


def main() -> None:
    """Both ways."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    ranks = start("cpu" if asked.tiny else "auto")
    rows: list[tuple[str, str]] = []

    def note(what: str, figure: str) -> None:
        rows.append((what, figure))
        if not ranks.rank:
            print(f"{what}: {figure}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        spec = VideoSpec(9, 64, 96) if asked.tiny else VideoSpec()
        student = make_student(spec, Path(folder), asked.tiny, ranks.device)
    first, together, x0 = make(student, Plan(compiled=not asked.tiny, ranks=ranks.world), asked.repeats)
    note(f"denoising, 4 steps, {ranks.world} GPUs together", f"{together:.3f} s (the first {first:.1f} s)")
    _, alone, wanted = make(student, Plan(compiled=not asked.tiny), asked.repeats)
    note("each alone", f"{alone:.3f} s, x{alone / together:.2f}")
    note("latents, relative L2", f"{float((x0 - wanted).norm() / wanted.norm()):.1e}")
    if not ranks.rank:
        append("together", rows, model="random weights")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
