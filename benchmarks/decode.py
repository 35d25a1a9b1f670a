"""Where the decoder's time goes: diffusers' stages, and every way to compute each of its convolutions.

    python benchmarks/decode.py [--tiny] [--part check,own,library,stages]

Random weights at 121 x 704 x 1280 in bfloat16; prints a table and appends it to benchmarks/results/.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.report import append
from stage1_encode.conv import Plan, by_library, fold

Row = tuple[str, str]
LAST3, LAST2 = torch.channels_last_3d, torch.channels_last


@dataclass(frozen=True)
class Shape:
    """One convolution of the decoder, for a step of `frames` frames."""

    name: str
    frames: int
    height: int
    width: int
    inputs: int
    outputs: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    space: int = 1
    time: int = 1

    @property
    def flops(self) -> float:
        """Of the plain way."""
        taps = self.kernel[0] * self.kernel[1] * self.kernel[2]
        places = self.frames * self.height * self.width * self.space**2
        return 2.0 * taps * self.inputs * self.outputs * self.time * places


def shapes(steps: int) -> list[Shape]:
    """Every convolution of the real decoder, `steps` latent frames at once."""
    return [
        Shape("44x80 1024>1024", steps, 44, 80, 1024, 1024),
        Shape("88x160 1024>1024", 2 * steps, 88, 160, 1024, 1024),
        Shape("176x320 1024>512", 4 * steps, 176, 320, 1024, 512),
        Shape("176x320 512>512", 4 * steps, 176, 320, 512, 512),
        Shape("352x640 512>256", 4 * steps, 352, 640, 512, 256),
        Shape("352x640 256>256", 4 * steps, 352, 640, 256, 256),
        Shape("352x640 256>12", 4 * steps, 352, 640, 256, 12),
        Shape("88x160 time 1024>2x1024", 2 * steps, 88, 160, 1024, 1024, (3, 1, 1), time=2),
        Shape("up to 176x320 1024>1024", 4 * steps, 88, 160, 1024, 1024, (1, 3, 3), space=2),
        Shape("up to 352x640 512>512", 4 * steps, 176, 320, 512, 512, (1, 3, 3), space=2),
    ]


def median(work: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of work on the GPU, after two runs that are not counted."""
    found = []
    for index in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if index > 1:
            found.append(begin.elapsed_time(end) / 1000)
    return sorted(found)[len(found) // 2]


def figure(shape: Shape, seconds: float) -> str:
    """Milliseconds and the rate of the plain way's operations."""
    return f"{seconds * 1e3:.2f} ms, {shape.flops / seconds / 1e12:.0f} TFLOP/s"


def draws(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Input (F + t - 1 X Y C), weight (N C t y x) and bias (N), bf16, on the GPU."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(shape.frames + shape.kernel[0] - 1, shape.height, shape.width, shape.inputs, **options)
    weight = torch.randn(shape.outputs * shape.time, shape.inputs, *shape.kernel, **options) / 64
    return x, weight, torch.randn(shape.outputs * shape.time, **options)


def library_ways(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
    """cuDNN's ways: 3-D, and 2-D over three frames' channels side by side."""
    video = x[None].permute(0, 4, 1, 2, 3)
    pad = (0, shape.kernel[1] // 2, shape.kernel[2] // 2)
    if shape.space == 2:
        frames = functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
        flat = weight[:, :, 0].contiguous(memory_format=LAST2)
        return [("cuDNN 2-D after nearest", lambda: functional.conv2d(frames, flat, bias, padding=1))]
    filters = weight.contiguous(memory_format=LAST3)
    ways = [("cuDNN 3-D", lambda: functional.conv3d(video, filters, bias, padding=pad))]
    if shape.kernel == (3, 3, 3):
        beside = torch.cat([x[i : i + shape.frames] for i in range(3)], dim=3).permute(0, 3, 1, 2)
        flat = weight.permute(0, 2, 1, 3, 4).flatten(1, 2).contiguous(memory_format=LAST2)
        ways.append(("cuDNN 2-D, frames side by side", lambda: functional.conv2d(beside, flat, bias, padding=1)))
    return ways


def own_plan(shape: Shape) -> Plan:
    """The plan that the decoder uses."""
    side = 2 if shape.space == 2 else shape.kernel[1]
    outputs = -(-shape.outputs // 16) * 16
    return Plan(
        shape.inputs, outputs, shape.kernel[0], side, columns=min(256, outputs), time=shape.time, space=shape.space
    )


def own_rows(shape: Shape) -> list[Row]:
    """Our kernel's time."""
    from stage1_encode.conv_kernel import convolve

    plan = own_plan(shape)
    x, weight, bias = draws(replace(shape, outputs=plan.outputs))
    folded = fold(weight, plan)
    return [(f"{shape.name}: own", figure(shape, median(lambda: convolve(x, folded, bias, plan))))]


def check_rows(shape: Shape) -> list[Row]:
    """Our kernel's error against float32, on a picture that no tile divides, with a residual."""
    from stage1_encode.conv_kernel import convolve

    plan = own_plan(shape)
    small = replace(shape, frames=min(3, shape.frames), height=21, width=37, outputs=plan.outputs)
    x, weight, bias = draws(small)
    more: dict[str, object] = {}
    if shape.space == 2:
        plan = replace(plan, repeats=4, halves=1)
        more = {"residual": torch.randn_like(x)}
    elif shape.kernel == (3, 3, 3):
        plan = replace(plan, repeats=1)
        more = {"residual": torch.randn(small.frames, 21, 37, plan.outputs, device="cuda", dtype=torch.bfloat16)}
    folded = fold(weight, plan)
    found = convolve(x, folded, bias, plan, **more).float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = {key: value.float() for key, value in more.items()}
        wanted = by_library(x.float(), folded.float(), bias.float(), plan, **exact)
    error = float((found - wanted).norm() / wanted.norm())
    again = convolve(x, folded, bias, plan, **more).float()
    if not (error < 1e-2 and torch.equal(found, again)):
        raise SystemExit(f"{shape.name}: error {error:.1e}, repeatable: {torch.equal(found, again)}")
    return [(f"{shape.name}: own, error", f"{error:.1e}")]


def library_rows(shape: Shape) -> list[Row]:
    """cuDNN's times."""
    x, weight, bias = draws(shape)
    return [(f"{shape.name}: {name}", figure(shape, median(way))) for name, way in library_ways(shape, x, weight, bias)]


def stage_rows(tiny: bool) -> list[Row]:
    """Seconds of diffusers' decode and of its parts, channels last."""
    width, dtype = (8, torch.float32) if tiny else (256, torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=width, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, is_residual=True,
            temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        ).to(dtype)  # fmt: skip
        for parameter in model.parameters():
            if parameter.dim() > 3:
                form = LAST3 if parameter.dim() == 5 else LAST2
                parameter.data = parameter.data.contiguous(memory_format=form)
        z = torch.randn((1, 48, 3, 4, 6) if tiny else (1, 48, 31, 44, 80), dtype=dtype)
    decoder, spent = model.decoder, {}
    rows = ours(model, z)

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(name: str, module: nn.Module) -> None:
        began = []
        module.register_forward_pre_hook(lambda *_: began.append(clock()))
        module.register_forward_hook(lambda *_: spent.__setitem__(name, spent.get(name, 0.0) + clock() - began.pop()))

    parts = {"mid": decoder.mid_block, "conv_out": decoder.conv_out, "norm_out": decoder.norm_out}
    parts |= {f"up {index}": block for index, block in enumerate(decoder.up_blocks)}
    parts |= {f"up {i}: upsampler": b.upsampler for i, b in enumerate(decoder.up_blocks) if b.upsampler is not None}
    with torch.no_grad():
        model.decode(z)
        began = clock()
        model.decode(z)
        rows.append(("diffusers decode", f"{clock() - began:.3f} s"))
        for name, module in parts.items():
            watch(name, module)
        model.decode(z)
    return rows + [(f"diffusers {name}", f"{seconds:.3f} s") for name, seconds in spent.items()]


def ours(model: AutoencoderKLWan, z: Tensor) -> list[Row]:
    """Seconds, memory and distance to diffusers of our decoder, by latent frames at once."""
    from stage1_encode.decoder import Decoder, Ways, stream

    gpu = z.device.type == "cuda"
    with torch.no_grad():
        wanted = model.decode(z).sample[0].float()
    decoder = Decoder(model, Ways(gpu))
    rows = []
    for most in (1, 2, 3):
        for _ in range(3):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            made = list(stream(decoder, z[0], most=most))
            if gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        found = rearrange(torch.cat(made), "f x y c -> c f x y").float() / 127.5 - 1
        db = float(-10 * ((found - wanted).square().mean() / 4).log10())
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        rows.append((f"ours, {most} at once", f"{seconds:.3f} s, peak {peak:.1f} GiB, PSNR {db:.1f} dB"))
        print(*rows[-1], flush=True)
    return rows


PARTS = {"check": check_rows, "own": own_rows, "library": library_rows}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="check,own,library,stages")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    rows: list[Row] = []
    for part in asked.part.split(","):
        began = time.perf_counter()
        if part == "stages":
            rows += stage_rows(asked.tiny)
        else:
            for shape in shapes(asked.steps):
                for row in PARTS[part](shape):
                    print(*row, flush=True)
                    rows.append(row)
        print(part, f"{time.perf_counter() - began:.1f} s", flush=True)
    append("decode", rows, model="random weights")


if __name__ == "__main__":
    main()
