"""One video from prompt and picture to the mp4 file by several GPUs together, then by one of them alone; same latents.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.together [--tiny] [--repeats 3]

As `sample --prompt` does it: all ranks denoise, the first does the rest. Random weights at 121 x 704 x 1280 in bfloat16
with compiled blocks; --tiny is a small model on the CPU. Prints figures as they are known and appends them to
benchmarks/results/.
"""

import argparse
import tempfile
from pathlib import Path

from torch import Tensor

from benchmarks.random_models import make_student
from benchmarks.report import append
from benchmarks.sample import Bench
from common.video import VideoSpec
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.sampling.multi_gpu import LeaderSampler, run_sampling_worker
from stage2_distill.sampling.student_sampler import StudentSampler


def share(student: StudentSampler, ranks: int, *, compiled: bool) -> None:
    """Let so many ranks have a part each of every video."""
    for block in student.net.blocks:
        block.plan = ExecutionPlan(compiled=compiled, ranks=ranks)


def videos(bench: Bench, how: str) -> tuple[float, Tensor]:
    """Seconds of a video, and its latents (C T H W)."""
    bench.whole(f"{how}, ")
    return bench.single, bench.latents()


def lead(bench: Bench, ranks: RankContext, *, compiled: bool) -> None:
    """Both ways on the first rank; the others end with the first way."""
    share(bench.student, ranks.world, compiled=compiled)
    with LeaderSampler(bench.student) as bench.sampler:
        both, x0 = videos(bench, f"{ranks.world} GPUs")
    bench.sampler = bench.student
    share(bench.student, 1, compiled=compiled)
    alone, wanted = videos(bench, "one GPU")
    bench.note(f"a video by {ranks.world} GPUs, against one", f"x{alone / both:.2f}")
    bench.note("latents, relative L2", f"{float((x0 - wanted).norm() / wanted.norm()):.1e}")


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    ranks = start_process_group("cpu" if asked.tiny else "auto")
    with tempfile.TemporaryDirectory() as work:
        if ranks.rank:
            spec = VideoSpec(9, 64, 96) if asked.tiny else VideoSpec()
            student = make_student(spec, Path(work), asked.tiny, ranks.device)
            share(student, ranks.world, compiled=not asked.tiny)
            run_sampling_worker(student)
            return
        bench = Bench(Path(work), asked.tiny, asked.repeats, 1)
        lead(bench, ranks, compiled=not asked.tiny)
        if not asked.tiny:
            append("together", bench.rows, model="random weights")


if __name__ == "__main__":
    main()
