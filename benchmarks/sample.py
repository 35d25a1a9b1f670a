"""Prompt and picture -> finished mp4, against diffusers' own pipeline with the same random weights, in one run.

    python -m benchmarks.sample [--tiny] [--repeats 5] [--rows 20] [--eager] [--only PART,PART]

121 x 704 x 1280 in bfloat16 with compiled blocks; --tiny is a random small model on the CPU, --eager compiles nothing.
The parts are whole, text, equality, small, rows, stock, streamed, tiny (a tiny decoder), and fp8 (also with it, and in
two steps). Compilation is reported separately. Under torchrun the GPUs share the rows of the part rows; in the others
each works for itself.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.random_models import diffusers_denoise, random_student, sampling_models, tiny_vae
from benchmarks.runner import Row, call_times, parse_arguments, peak_gib, run_benchmark, sync
from benchmarks.stock import PROMPT, compiled_blocks, run_stock
from benchmarks.watch import PartTimer, median_parts
from common.device import pick_device
from common.flow import timestep_sigmas
from common.seed import draw_normal, make_generator
from common.video import VideoSpec
from shards.latent_store import read_latents
from shards.record import Record, collate_records
from stage1_encode.generation.condition_encoder import encode_conditions
from stage1_encode.generation.generate import (
    GROUP_NAME,
    GenerationRequest,
    LatentSampler,
    generate_videos,
)
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import vae, vae_decoder
from stage2_distill.distributed.process_group import join_ranks, rank_and_world, wait_for_ranks
from stage2_distill.dmd.rollout import rollout
from stage2_distill.low_precision.fp8_linear import store_in_fp8
from stage2_distill.model.layers import ExecutionPlan
from stage2_distill.offload.streamed_blocks import StreamedModule
from stage2_distill.sampling.student_sampler import StudentSampler


class SampleBenchmark:
    """What the parts of the benchmark share."""

    def __init__(self, folder: Path, small: bool, repeats: int, count: int) -> None:
        self.folder, self.small, self.repeats, self.count = folder, small, repeats, count
        self.single = float("nan")  # seconds of one video
        self.device = pick_device("cpu" if small else "auto")
        self.ranks = rank_and_world()
        self.spec = VideoSpec(9, 64, 96) if small else VideoSpec()
        self.student = random_student(self.spec, small, self.device)
        self.sampler: LatentSampler = self.student
        self.models = sampling_models(small, self.device)
        noise = numpy.random.default_rng(0).integers(0, 255, (40, 70, 3), numpy.uint8)
        Image.fromarray(noise).resize((1400, 800), Image.Resampling.BICUBIC).save(folder / "first.png")
        self.diffusers_decoder: nn.Module | None = None  # once it has had to leave the GPU

    @cached_property
    def part_timer(self) -> PartTimer:
        """Records where the parts of videos begin and end."""
        return PartTimer(self.student.net, self.models.vae.decoder.network)

    def compile_nothing(self) -> None:
        """Do as `sample` does without --compile."""
        for block in self.student.net.blocks:
            block.plan = ExecutionPlan()

    def request(self, count: int) -> GenerationRequest:
        """Return a request for `count` videos."""
        table, out = self.folder / f"{count}.csv", self.folder / (f"{count}" if count > 1 else "one.mp4")
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "image", "seed"), *[(PROMPT, "first.png", n) for n in range(count)]])
        (self.folder / f"{count}").mkdir(exist_ok=True)
        ranks = self.ranks if count > 1 else (0, 1)
        return GenerationRequest(table, out, self.folder / f"{count}.zarr", self.spec, 0, 1, 1, *ranks)

    def generate(self, count: int, *, vram: str = "full") -> None:
        """Generate videos in a memory mode."""
        generate_videos(self.request(count), self.models, self.sampler, vram=vram)

    def records(self) -> list[Record]:
        """Return the records of one row."""
        request = self.request(1)
        (rows,) = read_shard_rows(request.csv_path, shard_size=9, text_only=True)
        return encode_conditions(self.models, rows, request.csv_path, self.spec, keep_text_on_device=True)

    def latents(self) -> Tensor:
        """Return the latents of the last single video, (C T H W)."""
        return read_latents(self.request(1).store, GROUP_NAME, 0)

    def whole_rows(self, prefix: str = "", steps: int = 4) -> Iterator[Row]:
        """Time prompt and picture to file, and the parts of the same videos."""
        first = call_times(lambda: self.generate(1), 1)[0]
        yield f"{prefix}first video, compilation included", f"{first:.2f} s"
        peak_gib()
        videos = [self.part_timer.time_videos(lambda: self.generate(1))[0] for _ in range(self.repeats)]
        parts, seconds = median_parts(videos), [video.whole for video in videos]
        self.single, span = parts.whole, f"{min(seconds):.2f}-{max(seconds):.2f}"
        yield f"{prefix}prompt + picture -> mp4", f"{self.single:.2f} s ({span}), peak {peak_gib():.1f} GiB"
        yield f"{prefix}denoising, {steps} steps", f"{parts.denoising:.3f} s"
        yield f"{prefix}decode", f"{parts.decode:.3f} s"
        yield f"{prefix}mp4 beyond the decode", f"{parts.after:.3f} s"
        yield f"{prefix}text, first frame and opening of files", f"{parts.before:.3f} s"

    def text_rows(self) -> Iterator[Row]:
        """Time text and first frame."""
        yield "text + first frame", f"{statistics.median(call_times(self.records, 1 + self.repeats)[1:]):.3f} s"

    def equality_rows(self) -> Iterator[Row]:
        """Compare latents with those of a second call and of diffusers' forward pass, and frame 0 with its input."""
        records = self.records()
        x0, again, first_frame = self.student(records, [0]), self.student(records, [0]), records[0].first_frame
        assert first_frame is not None
        pinned = torch.equal(x0[0, :, :1], first_frame.to(x0))
        yield "same seed, same latents; frame 0 pinned", f"{torch.equal(x0, again)}; {pinned}"
        error = (x0 - self.diffusers_latents(records)).norm() / x0.norm()
        yield "latents against the plain path, relative L2", f"{float(error):.2e}"

    @torch.no_grad()
    def diffusers_latents(self, records: list[Record]) -> Tensor:
        """Return the same latents by diffusers' own forward pass."""
        condition = collate_records(records).to(self.device)
        generators = [make_generator(0, 0, 0, "sample", self.device)]
        noise = draw_normal(self.spec.latent_shape, generators)

        def denoise(*arguments: object) -> Tensor:
            return diffusers_denoise(self.student.net, *arguments)

        return rollout(denoise, noise, condition, sigmas=self.student.sigmas, generators=generators)

    def stock_rows(self) -> Iterator[Row]:
        """Time diffusers' pipeline with 4 steps, and project 50 guided steps from the time of one."""
        if self.diffusers_decoder is not None:
            self.models.vae.model.decoder = self.diffusers_decoder.to(self.device)
        arguments = self.student.net, self.models, self.spec, self.folder, self.repeats
        stock = run_stock(*arguments)
        ours, guided = self.single, stock.whole + 96 * stock.step
        figure = f"{stock.whole:.2f} s, x{stock.whole / ours:.2f} of ours; a step {stock.step:.2f} s"
        yield "diffusers, 4 steps", figure
        with compiled_blocks(self.student.net):
            compiled = run_stock(*arguments)
        figure = f"{compiled.whole:.2f} s, x{compiled.whole / ours:.2f} of ours; a step {compiled.step:.2f} s"
        yield "diffusers with compiled blocks, 4 steps", figure
        yield "diffusers, 50 guided steps, projected", f"{guided:.0f} s, x{guided / ours:.1f} of ours"
        decoder, max_frames = self.models.vae.full_decoder.network, vae.CHUNK_FRAMES
        pixels = torch.cat(list(vae_decoder.stream_frames(decoder, stock.latents[0], max_frames=max_frames)))
        wanted = ((stock.video[0].float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
        psnr = -10 * float(((pixels.float() - wanted).square().mean() / 255**2).log10())
        yield "diffusers, decode", f"{stock.decode:.2f} s; PSNR of ours to it {psnr:.1f} dB"

    def small_card_rows(self) -> Iterator[Row]:
        """Time the memory mode for smaller cards."""
        if not self.request(1).store.exists():
            self.generate(1)
        full = self.latents()
        # `sample` drops diffusers' decoder, but the part stock needs it again
        self.diffusers_decoder = self.models.vae.model.decoder.to("cpu")
        self.models.vae.release_diffusers_decoder()
        yield self.memory_row("16gb", full)
        self.student.move_to(self.device)

    def memory_row(self, vram: str, full: Tensor) -> Row:
        """Time a memory mode, and compare its latents with those of the mode full."""
        self.generate(1, vram=vram)  # the first move to host memory, which copies, is not part of a video
        self.models.vae.decoder.free_memory()
        peak_gib()
        seconds = statistics.median(call_times(lambda: self.generate(1, vram=vram), self.repeats))
        same = f"same latents {torch.equal(self.latents(), full)}"
        return f"--vram {vram}", f"{seconds:.2f} s, peak {peak_gib():.1f} GiB, {same}"

    def streamed_rows(self) -> Iterator[Row]:
        """Time the mode of the smallest cards; the last part, because the blocks stay in host memory from then on."""
        if not self.request(1).store.exists():
            self.generate(1)
        full, cpu = self.latents(), torch.device("cpu")
        if self.diffusers_decoder is not None:
            self.models.vae.model.decoder = self.diffusers_decoder.to(self.device)
        own_vae = replace(self.models.vae, chunk_frames=1)
        own_vae.release_diffusers_decoder()
        self.student.move_to(cpu)
        self.models.text_tensors.move_to(cpu)
        net, text = self.student.net, self.models.text.model
        self.sampler = replace(self.student, streamed_net=StreamedModule(net, net.blocks, self.device))
        streamed_text = StreamedModule(text, text.encoder.block, self.device)
        self.models = replace(self.models, vae=own_vae, streamed_text=streamed_text)
        yield self.memory_row("12gb", full)

    def tiny_rows(self) -> Iterator[Row]:
        """Time the same video with a tiny decoder in the place of the VAE's own."""
        yield from self.other_rows("tiny decoder, ", self.student, tiny=True)

    def fp8_rows(self) -> Iterator[Row]:
        """Time the same video with products in 8 bits, with either decoder and in two steps."""
        student = random_student(self.spec, self.small, self.device)  # a copy would hold the hooks of other parts
        for block, measured in zip(student.net.blocks, self.student.net.blocks, strict=True):
            block.plan = measured.plan
        store_in_fp8(student.net)
        yield from self.other_rows("fp8, ", student)
        yield from self.other_rows("fp8, tiny decoder, ", student, tiny=True)
        short = replace(student, sigmas=timestep_sigmas((1000, 500), s=5.0))
        yield from self.other_rows("two steps, fp8, tiny decoder, ", short, tiny=True)

    def other_rows(self, prefix: str, student: StudentSampler, *, tiny: bool = False) -> Iterator[Row]:
        """Time a video by another sampler, or with a tiny decoder."""
        kept = self.sampler, self.models, self.part_timer, self.single
        self.sampler = student
        if tiny:
            self.models = replace(self.models, vae=tiny_vae(self.models.vae))
        self.part_timer = PartTimer(student.net, self.models.vae.decoder.network)
        yield from self.whole_rows(prefix, len(student.sigmas))
        self.sampler, self.models, self.part_timer, self.single = kept

    def many_rows(self) -> Iterator[Row]:
        """Time many rows of a CSV."""
        peak_gib()
        wait_for_ranks()
        began = sync()
        self.generate(self.count)
        sync()
        wait_for_ranks()
        seconds = (time.perf_counter() - began) / self.count
        rate = f"{3600 / seconds:.0f} videos an hour, x{self.single / seconds:.2f} of one at a time on one GPU"
        yield f"{self.count} rows on {self.ranks[1]} x {self.device.type}", f"{rate}; peak {peak_gib():.1f} GiB"


PARTS = {
    "whole": SampleBenchmark.whole_rows, "text": SampleBenchmark.text_rows, "equality": SampleBenchmark.equality_rows,
    "small": SampleBenchmark.small_card_rows, "rows": SampleBenchmark.many_rows, "stock": SampleBenchmark.stock_rows,
    "streamed": SampleBenchmark.streamed_rows, "tiny": SampleBenchmark.tiny_rows, "fp8": SampleBenchmark.fp8_rows,
}  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Run the parts of the command line."""
    bench = SampleBenchmark(folder, options.tiny, options.repeats, options.rows)
    if options.eager:
        bench.compile_nothing()
    for part in options.only.split(","):
        yield from PARTS[part](bench)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(__doc__, tiny=False, repeats=5, rows=20, only=",".join(PARTS), eager=False)
    rank, _ = join_ranks("cpu" if options.tiny else "auto")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
        run_benchmark("sample", rows, keep=not options.tiny, rank=rank, model="random weights")


if __name__ == "__main__":
    main()
