"""Prompt and picture -> finished mp4, against diffusers' own pipeline with the same random weights, in one run.

    python benchmarks/sample.py [--tiny] [--repeats 5] [--rows 20] [--no-stock]

121 x 704 x 1280 in bfloat16 with compiled blocks; --tiny is a random small model on the CPU. Compilation is reported
apart. Prints a table and appends it to benchmarks/results/.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from benchmarks.random_models import make_models, make_student, plain_denoise
from benchmarks.report import append
from common.seed import generator, normal
from common.video import VideoSpec
from shards.record import Record, collate
from stage1_encode import decoder, vae
from stage1_encode.conditions import make_records
from stage1_encode.mp4 import Film, write_video
from stage1_encode.rows import read_shards
from stage1_encode.videos import PLACINGS, Order, Placing, make_videos
from stage2_distill.rollout import rollout

Row = tuple[str, str]
PROMPT = "A red circle moves to the right, slowly, in front of a grey wall, and then it turns and comes back again."
GPU = torch.cuda.is_available()


def sync() -> float:
    """The time, once the GPU has done its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def times(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat."""
    found = []
    for _ in range(repeats):
        began = sync()
        work()
        found.append(sync() - began)
    return found


def peak() -> float:
    """Most GiB allocated since the last call."""
    if not GPU:
        return 0.0
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


class Bench:
    """What the parts of the benchmark share."""

    def __init__(self, folder: Path, small: bool, repeats: int) -> None:
        self.folder, self.small, self.repeats = folder, small, repeats
        self.device = torch.device("cuda" if GPU and not small else "cpu")
        self.spec = VideoSpec(9, 64, 96) if small else VideoSpec()
        self.student = make_student(self.spec, folder, small, self.device)
        self.models = make_models(folder, small, self.device)
        noise = numpy.random.default_rng(0).integers(0, 255, (40, 70, 3), numpy.uint8)
        Image.fromarray(noise).resize((1400, 800), Image.Resampling.BICUBIC).save(folder / "first.png")
        self.rows: list[Row] = []

    def note(self, what: str, figure: str) -> None:
        """Keep a figure, and print it at once."""
        self.rows.append((what, figure))
        print(f"{what}: {figure}", flush=True)

    def order(self, count: int) -> Order:
        """An order of `count` videos."""
        table, out = self.folder / f"{count}.csv", self.folder / (f"{count}" if count > 1 else "one.mp4")
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "image", "seed"), *[(PROMPT, "first.png", n) for n in range(count)]])
        (self.folder / f"{count}").mkdir(exist_ok=True)
        return Order(table, out, self.folder / f"{count}.zarr", self.spec, 0)

    def make(self, count: int, placing: Placing) -> None:
        """Make videos."""
        make_videos(self.order(count), self.models, self.student, placing)

    def records(self) -> list[Record]:
        """The records of one row."""
        order = self.order(1)
        (rows,) = read_shards(order.table, shard_size=9, text_only=True)
        return make_records(self.models, rows, order.table, self.spec, stay=True)

    def whole(self) -> float:
        """Prompt and picture to file; the median."""
        first = times(lambda: self.make(1, Placing()), 1)[0]
        self.note("first video, compilation included", f"{first:.2f} s")
        peak()
        found = times(lambda: self.make(1, Placing()), self.repeats)
        median = statistics.median(found)
        self.note(
            "prompt + picture -> mp4", f"{median:.2f} s ({min(found):.2f}-{max(found):.2f}), peak {peak():.1f} GiB"
        )
        return median

    def parts(self) -> None:
        """Denoising, decode, what the mp4 adds, text and first frame."""
        records = self.records()
        x0 = self.student(records, [0])

        def note(what: str, work: Callable[[], object], minus: float = 0.0) -> float:
            seconds = statistics.median(times(work, self.repeats)) - minus
            self.note(what, f"{seconds:.3f} s")
            return seconds

        decode = note("decode", lambda: list(vae.stream_video(self.models.vae, x0[0])))
        note("denoising, 4 steps", lambda: self.student(records, [0]))
        note("text + first frame", self.records)
        note("mp4 beyond the decode", lambda: self.film(x0[0]), decode)

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
        condition = collate(records).condition.to(self.device)
        draws = [generator(0, 0, 0, "sample", self.device)]
        noise = normal(self.spec.latent_shape, draws)

        def denoise(*given: object) -> Tensor:
            return plain_denoise(self.student.net, *given)

        return rollout(denoise, noise, condition, ladder=self.student.sigmas, generators=draws)

    def film(self, video: Tensor) -> None:
        """Decode into a file."""
        with Film(self.folder / "x.mp4", fps=24) as film:
            for frames in vae.stream_video(self.models.vae, video):
                film.add(frames)

    def stock(self, ours: float) -> None:
        """diffusers' pipeline with 4 steps, and 50 guided ones projected from its own step."""
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        pipe = WanImageToVideoPipeline(
            tokenizer=self.models.text.tokenizer, text_encoder=self.models.text.model, vae=self.models.vae.model,
            scheduler=scheduler, transformer=self.student.net, expand_timesteps=True,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        steps: list[float] = []
        hook = self.student.net.register_forward_hook(lambda *_: steps.append(sync()))

        def run() -> None:
            size = {"height": self.spec.height, "width": self.spec.width, "num_frames": self.spec.num_frames}
            image = Image.open(self.folder / "first.png").convert("RGB").resize((self.spec.width, self.spec.height))
            made = pipe(image, PROMPT, guidance_scale=1.0, num_inference_steps=4, output_type="np", **size).frames[0]
            write_video(self.folder / "stock.mp4", (made * 255).round().astype(numpy.uint8), fps=24)

        decoded: list[tuple[Tensor, Tensor, float]] = []
        plain = self.models.vae.model.decode

        def watched(z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            began = sync()
            (video,) = plain(z, return_dict=False)
            decoded.append((z, video, sync() - began))
            return (video,)

        self.models.vae.model.decode = watched
        found = statistics.median(times(run, min(3, self.repeats)))
        hook.remove()
        self.models.vae.model.decode = plain
        step = min(after - before for before, after in zip(steps, steps[1:], strict=False))
        self.note("diffusers, 4 steps", f"{found:.2f} s, x{found / ours:.2f} of ours; a step {step:.2f} s")
        guided = found + 96 * step
        self.note("diffusers, 50 guided steps, projected", f"{guided:.0f} s, x{guided / ours:.1f} of ours")
        z, video, seconds = decoded[-1]
        pixels = torch.cat(list(decoder.stream(self.models.vae.decoder, z[0], most=vae.STEPS)))
        wanted = ((video[0].float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)
        error = (pixels.float() - wanted).square().mean() / 255**2
        self.note("diffusers, decode", f"{seconds:.2f} s; PSNR of ours to it {float(-10 * error.log10()):.1f} dB")

    def small_cards(self) -> None:
        """The paths for smaller cards, and what decoding takes there by latent frames at once."""
        host = torch.device("cpu")
        self.models.vae.keep_fast_decoder()
        self.models.vae.decoder.release()
        records = self.records()
        if GPU:
            self.models.words.move(host)  # the first move, which copies, is not part of a video
        peak()
        x0 = self.student(records, [0])
        self.note("denoising without the text encoder, peak", f"{peak():.1f} GiB")
        if GPU:
            self.student.move(host)
        for most in (1, 2, 3):
            self.models.vae.decoder.release()
            peak()
            seconds = times(lambda most=most: list(vae.stream_video(self.models.vae, x0[0], steps=most)), 2)[-1]
            self.note(f"decode alone, {most} latent frames at once", f"{seconds:.3f} s, peak {peak():.1f} GiB")
        self.models.vae.decoder.release()
        for name in ("24gb", "16gb"):
            peak()
            found = times(lambda name=name: self.make(1, PLACINGS[name]), min(3, self.repeats))
            self.note(f"--memory {name}", f"{statistics.median(found):.2f} s, peak {peak():.1f} GiB")

    def many(self, count: int, single: float) -> None:
        """The rate over many rows."""
        rate = times(lambda: self.make(count, Placing()), 1)[0] / count
        self.note(f"{count} rows", f"{3600 / rate:.0f} videos an hour, x{single / rate:.2f} of one at a time")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--no-stock", action="store_true")
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), asked.tiny, asked.repeats)
        single = bench.whole()
        bench.parts()
        bench.equality()
        if not asked.no_stock:
            bench.stock(single)
        bench.small_cards()
        bench.many(asked.rows, single)
        append("sample", bench.rows, model="random weights")


if __name__ == "__main__":
    main()
