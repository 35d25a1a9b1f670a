"""Where the decoder's time goes: with PyTorch's operations and with our kernel, against diffusers.

    python benchmarks/decode.py [--tiny] [--part whole,stock]

Random weights at 121 x 704 x 1280 in bfloat16; prints each figure as it is known and appends them to
benchmarks/results/. `whole` decodes a video with and without our kernel, `stock` runs diffusers' decode.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.report import append
from stage1_encode.models import vae_decoder, vae_ops
from stage1_encode.models.vae_decoder import VideoDecoder, stream_frames
from stage1_encode.models.vae_ops import ConvSpec

Row = tuple[str, str]
GPU = torch.cuda.is_available()
STEPS = 2  # latent frames at once


@dataclass(frozen=True)
class Shape:
    """One convolution of the decoder: a step's frames, their size, and the plan."""

    frames: int
    height: int
    width: int
    plan: ConvSpec

    @property
    def name(self) -> str:
        """In a word."""
        kind = {(2, 1): " time", (1, 2): " up"}.get((self.plan.time, self.plan.space), "")
        return f"{self.height}x{self.width}{kind} {self.plan.channels}>{self.plan.outputs}"

    @property
    def flops(self) -> float:
        """That the folded form has."""
        taps = self.plan.depth * self.plan.side**2 * self.plan.channels
        outputs = self.plan.outputs * self.plan.time * self.plan.space**2
        return 2.0 * taps * outputs * self.frames * self.height * self.width


def settle() -> float:
    """The time, once the GPU has done its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(flops: float, seconds: float) -> str:
    """Seconds and operations a second."""
    return f"{seconds:.4f} s, {flops / seconds / 1e12:.0f} TFLOP/s"


class KernelTimer:
    """Notes when each convolution and each normalization of the decoder began and ended on the GPU."""

    def __init__(self) -> None:
        self.log: list[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, name: str, flops: float, work: Callable[[], Tensor | None]) -> Tensor | None:
        """Do some work between two events."""
        if not GPU:
            return work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = work()
        end.record()
        self.log.append((name, flops, begin, end))
        return result

    def norm_silu(self, x: Tensor, gamma: Tensor, out: Tensor) -> None:
        """Time `vae_ops.norm_silu`."""
        self.timed("norms", 0.0, lambda: vae_ops.norm_silu(x, gamma, out))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, spec: ConvSpec, *, residual: Tensor | None = None
    ) -> Tensor | None:
        """Time `vae_ops.convolve`."""
        shape = Shape(len(x) - spec.depth + 1, *x.shape[1:3], spec)
        return self.timed(shape.name, shape.flops, lambda: vae_ops.convolve(x, weight, bias, spec, residual=residual))

    def table(self) -> dict[str, tuple[float, float]]:
        """Seconds and operations by name."""
        sums: dict[str, tuple[float, float]] = {}
        for name, flops, begin, end in self.log:
            seconds, operations = sums.get(name, (0.0, 0.0))
            sums[name] = seconds + begin.elapsed_time(end) / 1000, operations + flops
        return sums


def make_model(tiny: bool) -> tuple[AutoencoderKLWan, Tensor]:
    """A random VAE with the true sizes, and raw latents (C T H W)."""
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device("cuda" if GPU else "cpu"):
        torch.manual_seed(0)
        model = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8 if tiny else 256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
            is_residual=True, temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        ).to(dtype)  # fmt: skip
        z = torch.randn((48, 3, 4, 6) if tiny else (48, 31, 44, 80), dtype=dtype)
    return model.eval().requires_grad_(False), z


def whole_rows(model: AutoencoderKLWan, z: Tensor) -> Iterator[Row]:
    """A video, with and without our kernel: first a few frames, which compiles and tries, then all, by kind of work."""
    first = None
    for name, norm in {"PyTorch's operations": vae_ops.norm_silu_torch, "our norms": vae_ops.norm_silu}.items():
        timer, decoder = KernelTimer(), VideoDecoder(model)
        with mock.patch.object(vae_decoder, "convolve", timer.convolve), \
                mock.patch.object(vae_decoder, "norm_silu", timer.norm_silu), \
                mock.patch.object(vae_ops, "norm_silu", norm):  # fmt: skip
            began = settle()
            list(stream_frames(decoder, z[:, :5], max_frames=STEPS))
            ready = settle()
            timer.log.clear()
            pixels = torch.cat(list(stream_frames(decoder, z, max_frames=STEPS)))
            seconds = settle() - ready
        first = pixels if first is None else first
        near, spread = psnr(pixels, first), float(pixels[::20].float().std())
        yield name, f"{seconds:.3f} s (ready after {ready - began:.1f} s; {near:.1f} dB to the first; std {spread:.0f})"
        table = timer.table()
        for part, (spent, flops) in table.items():
            yield f"{name}: {part}", rate(flops, spent)
        yield f"{name}: the rest", f"{seconds - sum(spent for spent, _ in table.values()):.4f} s"
        del decoder


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Of pixels uint8, in dB; 99 where they are equal."""
    error = sum(float((a.float() - b.float()).square().mean()) for a, b in zip(pixels, other, strict=True))
    return 99.0 if not error else float(-10 * torch.tensor(error / len(pixels) / 255**2).log10())


def stock_rows(model: AutoencoderKLWan, z: Tensor) -> Iterator[Row]:
    """diffusers' decode, how far ours is from it, and how far both are from float32 on a few frames."""
    ours = torch.cat(list(stream_frames(VideoDecoder(model), z, max_frames=STEPS)))
    few = z[:, :5]
    for run in ("first", "second"):
        began = settle()
        video = theirs(model, z)
        yield f"diffusers, {run} run", f"{settle() - began:.3f} s"
    yield "PSNR of ours to diffusers", f"{psnr(ours, video):.1f} dB"
    pair = {
        "ours": torch.cat(list(stream_frames(VideoDecoder(model), few, max_frames=STEPS))),
        "diffusers": theirs(model, few),
    }
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = theirs(model.float(), few.float())
    for name, video in pair.items():
        yield f"PSNR of {name} to float32, {len(exact)} frames", f"{psnr(video, exact):.1f} dB"


@torch.inference_mode()
def theirs(model: AutoencoderKLWan, z: Tensor) -> Tensor:
    """diffusers' pixels (F X Y 3), whole numbers."""
    video = model.decode(z[None]).sample[0].float().clamp(-1, 1)
    return ((video + 1) * 127.5).round().permute(1, 2, 3, 0)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="whole,stock")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    model, z = make_model(asked.tiny)
    parts = {"whole": whole_rows, "stock": stock_rows}
    rows: list[Row] = []
    for part in asked.part.split(","):
        for row in parts[part](model, z):
            print(*row, sep=": ", flush=True)
            rows.append(row)
    append("decode", rows, model="random weights")


if __name__ == "__main__":
    main()
