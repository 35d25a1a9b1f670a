"""Writes clips of the nano world as files: `python -m examples.nano.clips --count 192 --out examples/nano`.

Writes `clips/*.mp4` with `clips.csv` (video, prompt) for training, and `images/*.png` with `prompts.csv`
(prompt, image, seed) of held-out scenes for sampling; every fifth of those has no image: the prompt alone decides.
With `--conditions 8192 --out WORK` it writes the many first frames that distilling and evaluating on a GPU need, with
`--held-clips 8192 --out WORK` the whole held-out clips that `cli.py evaluate --true-clips WORK` compares.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from common.video import FrameSize, parse_frame_size
from examples.nano.captions import captions
from examples.nano.render import first_frames, render
from examples.nano.world import FPS, HEIGHT, WIDTH, draw_scenes
from stage1_encode.media.video_writer import write_video

CLIPS_SEED, PROMPTS_SEED, BATCH = 77, 78, 64
LANDSCAPE = (FrameSize(HEIGHT, WIDTH),)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def write_clips(
    out: Path, count: int, sizes: Sequence[FrameSize] = LANDSCAPE, *, seed: int = CLIPS_SEED, held: bool = False
) -> None:
    """Write `count` clips, of training or held out, and their CSV; batches of them take turns with the sizes."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for first, index, size in batches(count, sizes):
        scenes = draw_scenes(seed, index, held=held, size=size)
        for index, (video, prompt) in enumerate(zip(render(scenes), captions(scenes), strict=True)):
            name = f"clips/{first + index:06d}.mp4"
            write_video(out / name, video.numpy(), fps=FPS)
            rows.append((name, prompt))
    write_table(out / "clips.csv", ("video", "prompt"), rows)


def batches(count: int, sizes: Sequence[FrameSize]) -> Iterator[tuple[int, torch.Tensor, tuple[int, int]]]:
    """Yield the first index, the indices and the size of each batch of scenes; as many batches have each size."""
    step = min(BATCH, max(1, count // len(sizes))) if len(sizes) > 1 else BATCH
    for number, first in enumerate(range(0, count, step)):
        size = sizes[number % len(sizes)]
        yield first, torch.arange(first, min(first + step, count)), (size.height, size.width)


def write_conditions(
    out: Path, table: str, *, seed: int, count: int, held: bool, alone: int = 0, sizes: Sequence[FrameSize] = LANDSCAPE
) -> None:
    """Write `count` first frames to `out`/images, and their prompts to `table`; every `alone`-th has no image."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for first, indices, size in batches(count, sizes):
        scenes = draw_scenes(seed, indices, held=held, size=size)
        for index, (picture, prompt) in enumerate(
            zip(first_frames(scenes), captions(scenes), strict=True), start=first
        ):
            name = "" if alone and index % alone == alone - 1 else f"images/{index:02d}.png"
            if name:
                Image.fromarray(picture.numpy()).save(out / name)
            rows.append((prompt, name, index))
    write_table(out / table, ("prompt", "image", "seed"), rows)


def main() -> None:
    """Write clips and prompts, or with --conditions many first frames to distil on and to evaluate with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/nano"))
    parser.add_argument("--count", type=int, default=192, help="clips")
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts with their images")
    parser.add_argument("--conditions", type=int, default=0, help="write this many first frames to OUT/train instead")
    parser.add_argument(
        "--held-out", type=int, default=128, help="held-out first frames; with --conditions, in OUT/held"
    )
    parser.add_argument("--held-clips", type=int, default=0, help="write this many held-out whole clips instead")
    parser.add_argument(
        "--sizes",
        type=parse_frame_size,
        nargs="+",
        default=LANDSCAPE,
        help="such as 64x96 96x64 96x96 (height x width)",
    )
    args = parser.parse_args()
    sizes = tuple(args.sizes)
    held = {"seed": PROMPTS_SEED, "held": True, "sizes": sizes}
    if args.held_clips:
        write_clips(args.out, args.held_clips, **held)
        return
    if args.conditions:
        train = args.out / "train"
        write_conditions(train, "train.csv", seed=CLIPS_SEED, count=args.conditions, held=False, sizes=sizes)
        write_conditions(args.out / "held", "held.csv", count=args.held_out, **held)
        return
    write_clips(args.out, args.count, sizes)
    write_conditions(args.out, "prompts.csv", count=args.prompts, alone=5, **held)
    write_conditions(args.out, "held.csv", count=args.held_out, **held)


if __name__ == "__main__":
    main()
