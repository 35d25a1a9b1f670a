"""Speed of encode against the reference's way (whole clip decoded, one sample at a time), in one run.

From the repository's folder, with it on PYTHONPATH:

    python benchmarks/encode.py --clip tests/data/bigbuckbunny.mp4  (reading only)
    python benchmarks/encode.py --clip CLIP --model MODEL [--rows 512] [--vae-dtype float16] [--compile]

Prints a table and appends it to benchmarks/results/encode.md with the hardware, the date and the command.
"""

import argparse
import csv
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import av
import decord
import numpy
import torch

from common.video import VideoSpec
from shards.fingerprint import locate
from stage1_encode import frames, text, vae
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import encode
from stage1_encode.isolate import Readers
from stage1_encode.pipeline import PARTS, load_encoders, pick_device

RESULTS = Path(__file__).parent / "results" / "encode.md"
Row = tuple[str, str]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Best time of a piece of work, after one run that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def whole_clip(path: str, spec: VideoSpec) -> torch.Tensor:
    """The reference's way: every frame decoded and stretched, then a float tensor."""
    reader = decord.VideoReader(path, width=spec.width, height=spec.height)
    pixels = reader.get_batch(range(min(spec.num_frames, len(reader)))).asnumpy()
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1


def by_av(path: str) -> object:
    """The first frame by PyAV alone."""
    with frames._open(path) as file:
        return frames._read_with_av(file, frames._video_stream(file))


def bytes_read(work: Callable[[], object]) -> int:
    """Bytes that this process asked the system for during a piece of work (Linux)."""
    counter = Path("/proc/self/io")
    before = int(counter.read_text().split()[1])
    work()
    return int(counter.read_text().split()[1]) - before


def longer(clip: str, folder: Path, minutes: float) -> str:
    """The clip's packets repeated into a file of that many minutes."""
    path = folder / f"{minutes:g}-minutes.mp4"
    with av.open(clip) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        length = max(packet.pts + packet.duration for packet in packets) - min(packet.dts for packet in packets)
        times = [(packet.pts, packet.dts) for packet in packets]
        turns = max(1, round(minutes * 60 / float(length * packets[0].time_base)))
        for turn in range(turns):
            for packet, (pts, dts) in zip(packets, times, strict=True):
                packet.pts, packet.dts, packet.stream = pts + turn * length, dts + turn * length, stream
                target.mux(packet)
    return str(path)


def reading(clip: str, spec: VideoSpec, folder: Path) -> list[Row]:
    """First frames against whole clips; short files against long ones; both readers side by side."""
    size = {"height": spec.height, "width": spec.width}
    first = seconds(lambda: frames.first_frame(clip, **size))
    plain = seconds(lambda: decord.VideoReader(clip).get_batch(range(spec.num_frames)).asnumpy(), 3)
    whole = seconds(lambda: whole_clip(clip, spec), 2)
    rows = [
        ("first frame, resized, this process", f"{first * 1e3:.1f} ms"),
        ("whole clip, decoded only", f"{plain * 1e3:.0f} ms = {plain / first:.0f} x"),
        ("whole clip as the reference does, to a float tensor", f"{whole * 1e3:.0f} ms = {whole / first:.0f} x"),
    ]
    files = {"5 s": longer(clip, folder, 5 / 60), "10 min": longer(clip, folder, 10)}
    for name, path in files.items():
        megabytes = Path(path).stat().st_size / 2**20
        for reader, work in (
            ("decord", lambda path=path: frames._read_with_decord(path)),
            ("PyAV", lambda path=path: by_av(path)),
            ("as chosen", lambda path=path: frames.first_frame(path, **size)),
        ):
            read = bytes_read(work) / 2**20
            label = f"{name} ({megabytes:.1f} MiB), {reader}"
            rows.append((label, f"{seconds(work, 3) * 1e3:.1f} ms, {read:.2f} MiB read"))
    children = Readers(2, spec, 30.0)
    isolated = seconds(lambda: [future.result() for future in [children.submit(clip) for _ in range(16)]], 2) / 16
    children.close()
    return [*rows, ("first frame, two isolated children", f"{isolated * 1e3:.1f} ms a file")]


def write_rows(clip: str, folder: Path, count: int) -> Path:
    """A CSV of `count` rows with prompts of 30 to 150 words."""
    path, draw = folder / "rows.csv", numpy.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = [(Path(clip).absolute(), "word " * int(draw.integers(30, 150))) for _ in range(count)]
        csv.writer(file).writerows([("video", "prompt"), *rows])
    return path


def models(config: EncodeConfig, clip: str) -> list[Row]:
    """The two models alone, the reference's way of running them, and the error of a lower precision."""
    encoders, device = load_encoders(config), pick_device(config.device)
    frame = frames.first_frame(clip, height=config.height, width=config.width).pixels
    pixels = torch.from_numpy(numpy.stack([frame] * config.batch_size))
    plain = vae.load(locate(config.model, PARTS), dtype=torch.float32, device=device)
    images = pixels.permute(0, 3, 1, 2)[:, :, None].to(device).float() / 127.5 - 1
    with torch.inference_mode():
        slow = seconds(lambda: plain.model.encode(images[:1]).latent_dist.mode().cpu())
        exact = (plain.model.encode(images).latent_dist.mode() - plain.mean) / plain.std
    error = ((vae.encode_frames(encoders.vae, pixels) - exact).norm() / exact.norm()).item()
    fast = seconds(lambda: vae.encode_frames(encoders.vae, pixels).cpu()) / config.batch_size
    tokens = text.tokenize(encoders.text, ["word " * words for words in range(30, 150, 4)])
    one = seconds(lambda: [text.embed(encoders.text, [line], budget=1) for line in tokens[:4]], 2) / 4
    many = seconds(lambda: text.embed(encoders.text, tokens, budget=config.text_tokens)) / len(tokens)
    ours = f"VAE, one frame of {config.batch_size}, {config.vae_dtype}, here"
    return [
        ("VAE, one frame, float32, diffusers", f"{slow * 1e3:.2f} ms"),
        (
            ours,
            f"{fast * 1e3:.2f} ms = {slow / fast:.1f} x",
        ),
        ("relative error of the latents against float32", f"{error:.2e}"),
        ("UMT5, one prompt at a time", f"{one * 1e3:.2f} ms"),
        ("UMT5, a prompt in batches by length", f"{many * 1e3:.2f} ms = {one / many:.1f} x"),
        ("both models alone", f"{1 / (fast + many):.1f} records/s"),
    ]


def end_to_end(config: EncodeConfig) -> list[Row]:
    """The whole of encode, loading included and not."""
    began = time.perf_counter()
    report = encode(config)
    took = time.perf_counter() - began
    began = time.perf_counter()
    load_encoders(config)
    loading = time.perf_counter() - began
    rows = [
        ("encode, models loaded", f"{report.records / max(took - loading, 1e-9):.1f} records/s"),
        ("encode, all", f"{report.records / took:.1f} records/s ({report.records} in {took:.1f} s)"),
    ]
    if torch.cuda.is_available():
        rows.append(("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
    return rows


def main() -> None:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--model")
    for name, default in (("rows", 512), ("height", 704), ("width", 1280), ("batch-size", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vae-dtype", default="float16")
    parser.add_argument("--text-dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, spec = Path(work), VideoSpec(121, given.height, given.width)
        rows = reading(given.clip, spec, folder)
        if given.model:
            table = write_rows(given.clip, folder, given.rows)
            config = EncodeConfig(
                str(table), given.model, f"{work}/out", height=given.height, width=given.width,
                batch_size=given.batch_size, vae_dtype=given.vae_dtype, text_dtype=given.text_dtype,
                compile=given.compile,
            )  # fmt: skip
            rows += models(config, given.clip) + end_to_end(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    title = f"\n## {date.today()}, {device}, `PYTHONPATH=. python benchmarks/encode.py {' '.join(sys.argv[1:])}`\n\n"
    lines = title + "| what | measured |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
    print(lines)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(lines)


if __name__ == "__main__":
    main()
