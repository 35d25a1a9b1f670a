"""Where the decoder's time goes, by convolution, and how diffusers' decode compares.

    python -m benchmarks.decode [--tiny] [--part whole,stock]
    python -m benchmarks.decode --part quality --model MODEL --decoder FILE --latents X.zarr
    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m benchmarks.decode [--tiny] --part split [--repeats 5] [--chunk 2]

Random weights at 121 x 704 x 1280 in bfloat16. `whole` decodes a video twice, the second time with each convolution
timed; `stock` runs diffusers' decode and compares both with float32 on a few frames; `split` decodes a video by each
GPU alone and then by all together; `tiny` times both tiny decoders. `quality` compares a decoder with the VAE's own on
the videos of a store.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional

from benchmarks.random_models import Size, autoencoder, tiny_vae, unscaled_vae
from benchmarks.runner import Row, call_times, parse_arguments, peak_gib, run_benchmark, sync, time_call
from benchmarks.watch import Mark, record_mark, seconds_between
from common.model_folder import locate_model
from common.planning.codec_cost import decode_share
from shards.latent_store import complete_groups, describe_group, read_latents
from stage1_encode.decoders.load_decoder import TinyDecoder, use_decoder
from stage1_encode.decoders.split_decoder import share_decoder
from stage1_encode.models import vae
from stage1_encode.models.vae_decoder import FoldedConv, VideoDecoder, stream_frames
from stage2_distill.distributed.process_group import RankContext, start_process_group

FEW_FRAMES = 5  # latent frames of the comparison with float32


class ConvolutionTimer:
    """Times every convolution of a decoder by marks in the GPU's queue, and counts its operations."""

    def __init__(self, decoder: VideoDecoder) -> None:
        self.calls: list[tuple[str, float, Mark, Mark]] = []
        for layer in decoder.modules():
            if isinstance(layer, FoldedConv):
                layer.convolve = partial(self.time_layer, layer, layer.convolve)

    def time_layer(self, layer: FoldedConv, convolve: Callable[..., Tensor], x: Tensor, *others: object) -> Tensor:
        """Convolve x (F + depth - 1 X Y C) between two marks."""
        spec, height = layer.spec, x.shape[1]
        frames = len(x) - spec.depth + 1
        taps, columns = spec.depth * spec.side**2 * spec.channels, spec.outputs * spec.time * spec.space**2
        kind = {(2, 1): " time", (1, 2): " up"}.get((spec.time, spec.space), "")
        begin = record_mark()
        out = convolve(x, *others)
        name = f"{height}x{x.shape[2]}{kind} {spec.channels}>{spec.outputs}"
        self.calls.append((name, 2.0 * taps * columns * frames * height * x.shape[2], begin, record_mark()))
        return out

    def totals(self) -> dict[str, tuple[float, float]]:
        """Return seconds and operations by name."""
        totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for name, flops, begin, end in self.calls:
            seconds, before = totals[name]
            totals[name] = seconds + seconds_between(begin, end), before + flops
        return totals


def decode_video(decoder: VideoDecoder, z: Tensor) -> Tensor:
    """Return pixels (F X Y 3) uint8 of latents (C T H W)."""
    return torch.cat(list(stream_frames(decoder, z, max_frames=vae.CHUNK_FRAMES)))


def whole_rows(model: AutoencoderKLWan, z: Tensor) -> Iterator[Row]:
    """Decode a few frames, which compiles, then a video, then the same video with its convolutions timed."""
    decoder = unscaled_vae(model, z.device).full_decoder.network
    (ready,) = call_times(lambda: decode_video(decoder, z[:, :FEW_FRAMES]), 1)
    (seconds,) = call_times(lambda: decode_video(decoder, z), 1)
    yield "ours", f"{seconds:.3f} s (ready after {ready:.1f} s)"
    timer = ConvolutionTimer(decoder)
    (timed_seconds,) = call_times(lambda: decode_video(decoder, z), 1)
    totals = timer.totals()
    for name, (spent, flops) in totals.items():
        yield f"ours: {name}", f"{spent:.4f} s, {flops / spent / 1e12:.0f} TFLOP/s"
    yield "ours: the rest", f"{timed_seconds - sum(spent for spent, _ in totals.values()):.4f} s"


def stock_rows(model: AutoencoderKLWan, z: Tensor) -> Iterator[Row]:
    """Time diffusers' decode, and compare both decodes with each other and with float32 on a few frames."""
    decoder, few = unscaled_vae(model, z.device).full_decoder.network, z[:, :FEW_FRAMES]
    for run in ("first", "second"):
        began = sync()
        video = decode_with_diffusers(model, z)
        yield f"diffusers, {run} run", f"{sync() - began:.3f} s"
    yield "PSNR of ours to diffusers", f"{psnr(decode_video(decoder, z), video):.1f} dB"
    decoded = {"ours": decode_video(decoder, few), "diffusers": decode_with_diffusers(model, few)}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = decode_with_diffusers(model.float(), few.float())
    for name, video in decoded.items():
        yield f"PSNR of {name} to float32, {len(exact)} frames", f"{psnr(video, exact):.1f} dB"


@torch.inference_mode()
def decode_with_diffusers(model: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Return diffusers' pixels (F X Y 3), rounded."""
    video = model.decode(z[None]).sample[0].float().clamp(-1, 1)
    return ((video + 1) * 127.5).round().permute(1, 2, 3, 0)


def split_rows(model: AutoencoderKLWan, z: Tensor, ranks: RankContext, options: argparse.Namespace) -> Iterator[Row]:
    """Time the decode of one video by each GPU alone and by all together, and compare their pixels."""
    whole = replace(unscaled_vae(model, z.device), chunk_frames=options.chunk)
    seconds, videos = [], []
    for name, own in ("one GPU", whole), (f"{ranks.world} GPUs", share_decoder(whole, ranks.rank, ranks.world)):
        decode = partial(decode_frames, own.decoder, z)
        (first,) = call_times(decode, 1)
        peak_gib()
        seconds.append(time_call(decode, warm=0, repeats=options.repeats))
        yield name, f"{seconds[-1]:.3f} s, the first time {first:.2f} s, peak {peak_gib():.1f} GiB"
        videos.append(decode())
    yield "against one", f"x{seconds[0] / seconds[1]:.2f}, predicted x{1 / decode_share(ranks.world):.2f}"
    if ranks.rank == 0:  # the others have their own columns
        different = float((videos[0] != videos[1]).float().mean())
        yield "PSNR between them", f"{psnr(videos[1], videos[0]):.1f} dB, {100 * different:.2f} % of the bytes differ"


def tiny_rows(model: AutoencoderKLWan, z: Tensor, repeats: int) -> Iterator[Row]:
    """Time the full decoder and the two tiny ones; random weights show nothing alike, so rounding alone is compared."""
    whole = unscaled_vae(model, z.device)
    variants = {"full": whole, "tiny": tiny_vae(whole), "tiny, wide": tiny_vae(whole, is_wide=True)}
    full_seconds = float("nan")
    for name, own in variants.items():
        decode = partial(decode_frames, own.decoder, z)
        (first,) = call_times(decode, 1)
        peak_gib()
        seconds = time_call(decode, warm=0, repeats=repeats)
        full_seconds = seconds if name == "full" else full_seconds
        speed = f"{seconds:.3f} s, x{full_seconds / seconds:.1f} of full, the first time {first:.2f} s"
        yield name, f"{speed}, peak {peak_gib():.1f} GiB with all three decoders"
        own.decoder.free_memory()
    tiny, few = variants["tiny"].decoder, z[:, :FEW_FRAMES]
    rounded = decode_frames(tiny, few)
    assert isinstance(tiny, TinyDecoder)
    exact = replace(tiny, network=tiny.network.float(), dtype=torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield (
            f"PSNR of tiny to itself in float32, {len(rounded)} frames",
            f"{psnr(rounded, decode_frames(exact, few)):.1f} dB",
        )


def quality_rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Compare the pixels of a decoder with those of the VAE's own, on every video of a store's last group."""
    folder, dtype = locate_model(options.model, ("vae",)), torch.float32
    full = vae.load_vae(folder, dtype=dtype, device=device)
    other = use_decoder(vae.load_vae(folder, dtype=dtype, device=device), options.decoder)
    store = Path(options.latents)
    group = describe_group(store, complete_groups(store)[-1])
    figures = []
    for row in range(len(group.keys)):
        latents = read_latents(store, group.step, row)
        pixels, expected = decode_frames(other.decoder, latents), decode_frames(full.decoder, latents)
        figures.append((psnr(pixels, expected), ssim(pixels, expected)))
    for name, unit, values in zip(("PSNR", "SSIM"), (" dB", ""), zip(*figures, strict=True), strict=True):
        yield f"{name}, {len(values)} videos", f"{fmean(values):.3f}{unit}, {min(values):.3f} to {max(values):.3f}"


def ssim(pixels: Tensor, other: Tensor) -> float:
    """Return the mean structural similarity (Wang et al. 2004) of two videos (F X Y 3) uint8 over windows of 7 x 7."""
    a, b = (video.movedim(-1, 1).double() for video in (pixels, other))
    mean_a, mean_b, square_a, square_b, product = (
        functional.avg_pool2d(x, 7, stride=1) for x in (a, b, a.square(), b.square(), a * b)
    )
    small, large = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    numerator = (2 * mean_a * mean_b + small) * (2 * (product - mean_a * mean_b) + large)
    return float((numerator / ((mean_a.square() + mean_b.square() + small) * (variances + large))).mean())


def decode_frames(decoder: vae.LatentDecoder, latents: Tensor) -> Tensor:
    """Return pixels (F X Y 3) uint8 of one video's latents (C T H W)."""
    return torch.cat(list(decoder.decode_stream(latents)))


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Return the PSNR of two videos in dB; 99 if they are equal."""
    error = sum(float((a.float() - b.float()).square().mean()) for a, b in zip(pixels, other, strict=True))
    return 99.0 if not error else float(-10 * torch.tensor(error / len(pixels) / 255**2).log10())


def measure(options: argparse.Namespace, ranks: RankContext) -> Iterator[Row]:
    """Measure the parts of the command line."""
    device, dtype = ranks.device, torch.float32 if options.tiny else torch.bfloat16
    if options.part == "quality":
        yield from quality_rows(options, device)
        return
    torch.manual_seed(0)
    model = autoencoder(Size(base=8), device, decoder=8 if options.tiny else 256).to(dtype)
    z = torch.randn((48, 3, 4, 6) if options.tiny else (48, 31, 44, 80), dtype=dtype, device=device)
    split = partial(split_rows, ranks=ranks, options=options)
    parts = {"whole": whole_rows, "stock": stock_rows, "split": split}
    parts["tiny"] = partial(tiny_rows, repeats=options.repeats)
    for part in options.part.split(","):
        yield from parts[part](model, z)


def main() -> None:
    """Measure, print and append to the results."""
    options = parse_arguments(
        __doc__, tiny=False, part="whole,stock", repeats=5, chunk=vae.CHUNK_FRAMES, model="", decoder="", latents=""
    )
    ranks = start_process_group("cpu" if options.tiny else "auto")
    rows = measure(options, ranks)
    run_benchmark("decode", rows, keep=not options.tiny, rank=ranks.rank, model=options.model or "random weights")


if __name__ == "__main__":
    main()
