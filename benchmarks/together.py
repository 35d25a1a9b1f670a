"""One video from prompt and picture to the mp4 file by several GPUs together, then by one of them alone; same latents.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.together [--decoder tiny] [--fp8] [--tiny]

As in `sample --prompt`, all ranks denoise and decode, and the first does the rest; with --decoder tiny it decodes too.
--shared-only leaves out the part by one GPU alone.
Random weights at 121 x 704 x 1280 in bfloat16 with compiled blocks; --tiny is a small model on the CPU.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.random_models import random_student, sampling_autoencoder, tiny_vae, unscaled_vae
from benchmarks.runner import Row, parse_arguments, run_benchmark
from benchmarks.sample import SampleBenchmark
from benchmarks.watch import PartTimer
from common.video import VideoSpec
from stage1_encode.decoders.split_decoder import decode_own_parts, share_decoder
from stage1_encode.models.vae import WanVae
from stage2_distill.distributed.process_group import RankContext, start_process_group
from stage2_distill.low_precision.fp8_linear import store_in_fp8
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.sampling.multi_gpu import LeaderSampler, follow_requests
from stage2_distill.sampling.student_sampler import StudentSampler


def make_student(options: argparse.Namespace, student: StudentSampler) -> StudentSampler:
    """The student in the precision of the command line."""
    if options.fp8:
        store_in_fp8(student.net)
    return student


def share_video(student: StudentSampler, ranks: int, *, compiled: bool) -> None:
    """Split every video over so many ranks."""
    for block in student.net.blocks:
        block.plan = ExecutionPlan(compiled=compiled, ranks=ranks)


def run_worker(options: argparse.Namespace, ranks: RankContext) -> None:
    """Denoise and decode with the first rank until it is done."""
    spec = VideoSpec(9, 64, 96) if options.tiny else VideoSpec()
    student = make_student(options, random_student(spec, options.tiny, ranks.device))
    share_video(student, ranks.world, compiled=not options.tiny)
    whole = choose_decoder(options, unscaled_vae(sampling_autoencoder(options.tiny, ranks.device), ranks.device))
    autoencoder = share_decoder(whole, ranks.rank, ranks.world)
    for x0 in follow_requests(student):
        decode_own_parts(autoencoder, x0)


def choose_decoder(options: argparse.Namespace, autoencoder: WanVae) -> WanVae:
    """Return the VAE with the decoder of the command line."""
    return {"full": autoencoder, "tiny": tiny_vae(autoencoder)}[options.decoder]


def change_decoder(bench: SampleBenchmark, autoencoder: WanVae) -> None:
    """Decode with another decoder, and time it."""
    bench.models = replace(bench.models, vae=autoencoder)
    bench.part_timer = PartTimer(bench.student.net, autoencoder.decoder.network)


def measure(options: argparse.Namespace, ranks: RankContext, folder: Path) -> Iterator[Row]:
    """Measure both ways on the first rank; the others end after the first way."""
    bench = SampleBenchmark(folder, options.tiny, options.repeats, 1)
    share_video(make_student(options, bench.student), ranks.world, compiled=not options.tiny)
    whole = choose_decoder(options, bench.models.vae)
    change_decoder(bench, share_decoder(whole, ranks.rank, ranks.world))
    with LeaderSampler(bench.student) as bench.sampler:
        yield from bench.whole_rows(f"{ranks.world} GPUs, ")
        shared, x0 = bench.single, bench.latents()
    yield "decoder; precision", f"{options.decoder}; {'fp8' if options.fp8 else 'exact'}"
    if options.shared_only:
        return
    bench.sampler = bench.student
    change_decoder(bench, whole)
    share_video(bench.student, 1, compiled=not options.tiny)
    yield from bench.whole_rows("one GPU, ")
    alone, wanted = bench.single, bench.latents()
    yield f"a video by {ranks.world} GPUs, against one", f"x{alone / shared:.2f}"
    yield "latents, relative L2", f"{float((x0 - wanted).norm() / wanted.norm()):.1e}"


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, repeats=3, decoder="full", fp8=False, shared_only=False)
    ranks = start_process_group("cpu" if options.tiny else "auto")
    if ranks.rank:
        run_worker(options, ranks)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, ranks, Path(folder))
        run_benchmark("together", rows, keep=not options.tiny, model="random weights")


if __name__ == "__main__":
    main()
