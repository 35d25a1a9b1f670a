"""Prompt and picture -> finished mp4, against diffusers' own pipeline with the same random weights, in one run.

    python benchmarks/sample.py [--tiny] [--repeats 5] [--rows 20] [--eager] [--only PART,PART]

121 x 704 x 1280 in bfloat16 with compiled blocks; --tiny is a random small model on the CPU. Compilation is reported
apart. Prints a table and appends it to benchmarks/results/.
"""

import argparse
import csv
import statistics
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.clock import GPU, peak, times
from benchmarks.random_models import make_models, make_student, plain_denoise
from benchmarks.report import append
from benchmarks.stock import PROMPT, run_stock
from benchmarks.watch import Watch, medians
from common.seed import draw_normal, make_generator
from common.video import VideoSpec
from shards.latent_store import read_latents
from shards.record import Record, collate_records
from stage1_encode.generation.condition_encoder import encode_conditions
from stage1_encode.generation.generate import (
    GROUP_NAME,
    MEMORY_PLANS,
    GenerationRequest,
    LatentSampler,
    MemoryPlan,
    generate_videos,
)
from stage1_encode.media.rows import read_shard_rows
from stage1_encode.models import vae, vae_decoder
from stage2_distill.dmd.rollout import rollout
from stage2_distill.model.layers import ExecutionPlan

Row = tuple[str, str]


class Bench:
    """What the parts of the benchmark share."""

    def __init__(self, folder: Path, small: bool, repeats: int, count: int) -> None:
        self.folder, self.repeats, self.count = folder, repeats, count
        self.single = float("nan")  # seconds of one video
        self.device = torch.device("cuda" if GPU and not small else "cpu")
        self.spec = VideoSpec(9, 64, 96) if small else VideoSpec()
        self.student = make_student(self.spec, folder, small, self.device)
        self.sampler: LatentSampler = self.student
        self.models = make_models(folder, small, self.device)
        noise = numpy.random.default_rng(0).integers(0, 255, (40, 70, 3), numpy.uint8)
        Image.fromarray(noise).resize((1400, 800), Image.Resampling.BICUBIC).save(folder / "first.png")
        self.rows: list[Row] = []
        self.theirs: nn.Module | None = None  # diffusers' decoder, where it had to go

    @cached_property
    def watch(self) -> Watch:
        """Where the parts of videos begin and end."""
        return Watch(self.student.net, self.models.vae.decoder)

    def compile_nothing(self) -> None:
        """What `sample` does without --compile."""
        for block in self.student.net.blocks:
            block.plan = ExecutionPlan()
        self.models = replace(self.models, vae=replace(self.models.vae, compiled=False))

    def note(self, what: str, figure: str) -> None:
        """Keep a figure, and print it at once."""
        self.rows.append((what, figure))
        print(f"{what}: {figure}", flush=True)

    def order(self, count: int) -> GenerationRequest:
        """An order of `count` videos."""
        table, out = self.folder / f"{count}.csv", self.folder / (f"{count}" if count > 1 else "one.mp4")
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "image", "seed"), *[(PROMPT, "first.png", n) for n in range(count)]])
        (self.folder / f"{count}").mkdir(exist_ok=True)
        return GenerationRequest(table, out, self.folder / f"{count}.zarr", self.spec, 0)

    def make(self, count: int, placing: MemoryPlan) -> None:
        """Make videos."""
        generate_videos(self.order(count), self.models, self.sampler, placing)

    def records(self) -> list[Record]:
        """The records of one row."""
        order = self.order(1)
        (rows,) = read_shard_rows(order.csv_path, shard_size=9, text_only=True)
        return encode_conditions(self.models, rows, order.csv_path, self.spec, keep_text_on_device=True)

    def whole(self, how: str = "") -> None:
        """Prompt and picture to file, and the parts of the same videos."""
        first = times(lambda: self.make(1, MemoryPlan()), 1)[0]
        self.note(f"{how}first video, compilation included", f"{first:.2f} s")
        peak()
        found = [self.watch.videos(lambda: self.make(1, MemoryPlan()))[0] for _ in range(self.repeats)]
        parts, spread = medians(found), [one.whole for one in found]
        self.single, span = parts.whole, f"{min(spread):.2f}-{max(spread):.2f}"
        self.note(f"{how}prompt + picture -> mp4", f"{self.single:.2f} s ({span}), peak {peak():.1f} GiB")
        self.note(f"{how}denoising, 4 steps", f"{parts.denoising:.3f} s")
        self.note(f"{how}decode", f"{parts.decode:.3f} s")
        self.note(f"{how}mp4 beyond the decode", f"{parts.after:.3f} s")
        self.note(f"{how}text, first frame and opening of files", f"{parts.before:.3f} s")

    def text(self) -> None:
        """Text and first frame."""
        seconds = statistics.median(times(self.records, 1 + self.repeats)[1:])
        self.note("text + first frame", f"{seconds:.3f} s")

    def equality(self) -> None:
        """The same twice, the given frame kept, and the plain path's numbers."""
        records = self.records()
        x0, again, given = self.student(records, [0]), self.student(records, [0]), records[0].first_frame
        assert given is not None
        pinned = torch.equal(x0[0, :, :1], given.to(x0))
        self.note("same seed, same latents; frame 0 pinned", f"{torch.equal(x0, again)}; {pinned}")
        error = (x0 - self.plain(records)).norm() / x0.norm()
        self.note("latents against the plain path, relative L2", f"{float(error):.2e}")

    @torch.no_grad()
    def plain(self, records: list[Record]) -> Tensor:
        """The same latents by diffusers' own forward."""
        condition = collate_records(records).to(self.device)
        draws = [make_generator(0, 0, 0, "sample", self.device)]
        noise = draw_normal(self.spec.latent_shape, draws)

        def denoise(*given: object) -> Tensor:
            return plain_denoise(self.student.net, *given)

        return rollout(denoise, noise, condition, sigmas=self.student.sigmas, generators=draws)

    def stock(self) -> None:
        """diffusers' pipeline with 4 steps, and 50 guided ones projected from its own step."""
        if self.theirs is not None:
            self.models.vae.model.decoder = self.theirs.to(self.device)
        found = run_stock(self.student.net, self.models, self.spec, self.folder, self.repeats)
        ours, guided = self.single, found.whole + 96 * found.step
        self.note(
            "diffusers, 4 steps", f"{found.whole:.2f} s, x{found.whole / ours:.2f} of ours; a step {found.step:.2f} s"
        )
        self.note("diffusers, 50 guided steps, projected", f"{guided:.0f} s, x{guided / ours:.1f} of ours")
        pixels = torch.cat(
            list(
                vae_decoder.stream_frames(
                    self.models.vae.decoder, found.latents[0], max_frames=vae.DEFAULT_CHUNK_FRAMES
                )
            )
        )
        wanted = ((found.video[0].float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
        psnr = -10 * float(((pixels.float() - wanted).square().mean() / 255**2).log10())
        self.note("diffusers, decode", f"{found.decode:.2f} s; PSNR of ours to it {psnr:.1f} dB")

    def latents(self) -> Tensor:
        """Those of the last single video, (C T H W)."""
        return read_latents(self.order(1).store, GROUP_NAME, 0)

    def small_cards(self) -> None:
        """The paths for smaller cards."""
        if not self.order(1).store.exists():
            self.make(1, MemoryPlan())
        full = self.latents()
        self.theirs = self.models.vae.model.decoder.to("cpu")  # `sample` lets go of it, diffusers will want it again
        self.models.vae.release_diffusers_decoder()
        self.make(1, MEMORY_PLANS["24gb"])  # the first move to host memory, which copies, is not part of a video
        for name in ("24gb", "16gb"):
            self.models.vae.decoder.release()
            peak()
            found = times(lambda name=name: self.make(1, MEMORY_PLANS[name]), self.repeats)
            same = f"same latents {torch.equal(self.latents(), full)}"
            self.note(f"--memory {name}", f"{statistics.median(found):.2f} s, peak {peak():.1f} GiB, {same}")
        self.student.move_to(self.device)

    def many(self) -> None:
        """The rate over many rows."""
        found = self.watch.videos(lambda: self.make(self.count, MemoryPlan()))
        rate, parts, first = sum(one.whole for one in found) / self.count, medians(found[1:]), found[0].before
        self.note(f"{self.count} rows", f"{3600 / rate:.0f} videos an hour, x{self.single / rate:.2f} of one at a time")
        told = f"denoising {parts.denoising:.3f} s, decode {parts.decode:.3f} s, between videos {parts.before:.3f} s"
        self.note("of them a later one", f"{told}; {first:.2f} s before the first")


PARTS = {"whole": Bench.whole, "text": Bench.text, "equality": Bench.equality, "small": Bench.small_cards,
         "rows": Bench.many, "stock": Bench.stock}  # fmt: skip


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), asked.tiny, asked.repeats, asked.rows)
        if asked.eager:
            bench.compile_nothing()
        for part in asked.only.split(","):
            PARTS[part](bench)
        if not asked.tiny:
            append("sample", bench.rows, model="random weights")


if __name__ == "__main__":
    main()
