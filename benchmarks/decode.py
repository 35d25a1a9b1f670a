"""Where the decoder's time goes: by PyTorch's operations and by our kernels, against diffusers.

    python benchmarks/decode.py [--tiny] [--part whole,check,stock]

Random weights at 121 x 704 x 1280 in bfloat16; prints each figure as it is known and appends them to
benchmarks/results/. `whole` decodes a video in every way, `check` compares our convolutions with float32, `stock` runs
diffusers' decode.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.report import append
from stage1_encode.models.vae_decoder import VideoDecoder, stream_frames
from stage1_encode.models.vae_ops import ConvSpec, KernelBackend, convolve_torch, fold_weight

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
        return 2.0 * taps * self.plan.product * self.frames * self.height * self.width


def settle() -> float:
    """The time, once the GPU has done its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(flops: float, seconds: float) -> str:
    """Seconds and operations a second."""
    return f"{seconds:.4f} s, {flops / seconds / 1e12:.0f} TFLOP/s"


@dataclass(frozen=True)
class Watched(KernelBackend):
    """Ways that note when each piece of work began and ended on the GPU."""

    log: list[tuple[str, float, object, object]] = field(default_factory=list)

    def watch(self, name: str, flops: float, work: Callable[[], Tensor | None]) -> Tensor | None:
        """Do it, between two events."""
        if not GPU:
            return work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        made = work()
        end.record()
        self.log.append((name, flops, begin, end))
        return made

    def norm_silu(self, x: Tensor, gamma: Tensor, out: Tensor) -> None:
        """As ever."""
        self.watch("norms", 0.0, lambda: super(Watched, self).norm_silu(x, gamma, out))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, plan: ConvSpec, *, residual: Tensor | None, skip: int
    ) -> Tensor:
        """As ever."""
        shape, plain = Shape(len(x) - plan.depth + 1, *x.shape[1:3], plan), super().convolve
        return self.watch(shape.name, shape.flops, lambda: plain(x, weight, bias, plan, residual=residual, skip=skip))

    def table(self) -> dict[str, tuple[float, float]]:
        """Seconds and operations by name."""
        found: dict[str, tuple[float, float]] = {}
        for name, flops, begin, end in self.log:
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + begin.elapsed_time(end) / 1000, before[1] + flops
        return found


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
    """A video in every way: first a few frames, which compiles and tries, then all, by kind of work."""
    ways = {"PyTorch's operations": KernelBackend()}
    if GPU:
        ways |= {
            "our norms": KernelBackend(triton_norms=True),
            "compiled": KernelBackend(triton_norms=True, convolutions=True),
        }
    first = None
    for name, way in ways.items():
        watched = Watched(way.triton_norms, way.convolutions)
        decoder = VideoDecoder(model, watched)
        began = settle()
        list(stream_frames(decoder, z[:, :5], max_frames=STEPS))
        ready = settle()
        watched.log.clear()
        pixels = torch.cat(list(stream_frames(decoder, z, max_frames=STEPS)))
        seconds = settle() - ready
        first = pixels if first is None else first
        near, spread = psnr(pixels, first), float(pixels[::20].float().std())
        yield name, f"{seconds:.3f} s (ready after {ready - began:.1f} s; {near:.1f} dB to the first; std {spread:.0f})"
        table = watched.table()
        for part, (spent, flops) in table.items():
            yield f"{name}: {part}", rate(flops, spent)
        yield f"{name}: the rest", f"{seconds - sum(spent for spent, _ in table.values()):.4f} s"
        del decoder


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Of pixels uint8, in dB; 99 where they are equal."""
    error = sum(float((a.float() - b.float()).square().mean()) for a, b in zip(pixels, other, strict=True))
    return 99.0 if not error else float(-10 * torch.tensor(error / len(pixels) / 255**2).log10())


def shapes() -> list[Shape]:
    """The convolutions that have work to do."""
    rows = [(2, 44, 1024, 1024), (4, 88, 1024, 1024), (8, 176, 1024, 512), (8, 176, 512, 512), (8, 352, 512, 256),
            (8, 352, 256, 256)]  # fmt: skip
    plain = [Shape(f, high, high * 20 // 11, ConvSpec(c, n, columns=256)) for f, high, c, n in rows]
    return [
        *plain,
        Shape(4, 88, 160, ConvSpec(1024, 1024, side=1, time=2)),
        Shape(8, 88, 160, ConvSpec(1024, 1024, depth=1, side=2, space=2)),
        Shape(8, 176, 320, ConvSpec(512, 512, depth=1, side=2, space=2)),
    ]


def draws(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Input (F + t - 1 X Y C), folded weight (N' K) and bias, bf16, on the GPU."""
    plan, options = shape.plan, {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(shape.frames + plan.depth - 1, shape.height, shape.width, plan.channels, **options)
    side = 3 if plan.space == 2 else plan.side
    weight = torch.randn(plan.outputs * plan.time, plan.channels, plan.depth, side, side, **options) / 64
    return x, fold_weight(weight, plan), torch.randn(plan.outputs * plan.time, **options)


def check_rows(_model: AutoencoderKLWan, _z: Tensor) -> Iterator[Row]:
    """Our kernel's error against float32 in every convolution, with a residual where there is one."""
    from stage1_encode.models.vae_conv_kernel import convolve_hopper

    for shape in shapes():
        small = replace(shape, frames=3, height=21, width=37)  # which no tile divides
        x, weight, bias = draws(small)
        plan, more = shape.plan, dict[str, Tensor]()
        if plan.space == 2:
            plan, more = replace(plan, repeats=4, halves=1), {"residual": torch.randn_like(x)}
        elif plan.depth == plan.side == 3:
            residual = torch.randn(3, 21, 37, plan.outputs, device="cuda", dtype=torch.bfloat16)
            plan, more = replace(plan, repeats=1), {"residual": residual}
        found, again = (convolve_hopper(x, weight, bias, plan, **more).float() for _ in range(2))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = {key: value.float() for key, value in more.items()}
            wanted = convolve_torch(x.float(), weight.float(), bias.float(), plan, **exact)
        error = float((found - wanted).norm() / wanted.norm())
        assert error < 1e-2, (shape.name, error)
        yield f"{shape.name}: error of ours to float32", f"{error:.1e}, the same twice: {torch.equal(found, again)}"


def stock_rows(model: AutoencoderKLWan, z: Tensor) -> Iterator[Row]:
    """diffusers' decode, how far ours is from it, and how far both are from float32 on a few frames."""
    ways = KernelBackend(triton_norms=GPU, convolutions=GPU)
    ours = torch.cat(list(stream_frames(VideoDecoder(model, ways), z, max_frames=STEPS)))
    few = z[:, :5]
    for run in ("first", "second"):
        began = settle()
        video = theirs(model, z)
        yield f"diffusers, {run} run", f"{settle() - began:.3f} s"
    yield "PSNR of ours to diffusers", f"{psnr(ours, video):.1f} dB"
    pair = {
        "ours": torch.cat(list(stream_frames(VideoDecoder(model, ways), few, max_frames=STEPS))),
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
    parser.add_argument("--part", default="whole,check,stock")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    model, z = make_model(asked.tiny)
    parts = {"whole": whole_rows, "check": check_rows, "stock": stock_rows}
    rows: list[Row] = []
    for part in asked.part.split(","):
        for row in parts[part](model, z):
            print(*row, sep=": ", flush=True)
            rows.append(row)
    append("decode", rows, model="random weights")


if __name__ == "__main__":
    main()
