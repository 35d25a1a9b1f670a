"""Pictures of nano clips: rows are clips, columns are frames. Shapes: N clips, T frames, H W pixels.

`python -m examples.nano.show REPORT PICTURE` draws what `cli.py evaluate --out REPORT` compared: for each of the first
conditions the teacher at 50 steps, at 4, the undistilled student and the student, all with the first seed. If PICTURE
ends in .webp it moves: a labelled column for the teacher, the undistilled student and the student, and a row for each
of the conditions in which distillation brings the student nearest to its teacher.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shards.comparison import COMPARISON_FILE, LATENTS_STORE, latent_set_name, read_comparison
from shards.latent_store import read_latent_rows
from stage1_encode.models import vae
from stage2_distill.evaluation.latent_metrics import rms_distance

MODEL = Path("examples/nano/model")
SHOWN = 4  # candidates; further checkpoints come after the first student

COLUMNS = (0, 2, 4, 6, 8, 10, 12, 14, 16)
MOVING = ("teacher", "undistilled", "student")  # candidates of a moving picture
SCALE, GAP, LABEL_HEIGHT = 2, 4, 24  # pixels per pixel; between clips; above a column
FRAME_SECONDS, PAUSE_SECONDS = 1 / 12, 1.0


def sheet(clips: Tensor, path: Path, *, gap_every: int = 1) -> None:
    """Write uint8 clips (N T H W 3) as one PNG of 256 colours, a light line after every `gap_every` rows.

    MAXCOVERAGE keeps the colours of objects, which have few pixels: other methods spend the palette on the background.
    """
    frames = clips[:, list(COLUMNS)].cpu()
    rows = rearrange(frames, "n t h w c -> n h t w c")
    rows = torch.nn.functional.pad(rows.float(), (0, 0, 1, 1), value=255)
    lines = rearrange(rows, "n h t w c -> n h (t w) c").to(torch.uint8)
    blocks = []
    for i, line in enumerate(lines):
        blocks += [line, torch.full((4 if (i + 1) % gap_every == 0 else 1, *line.shape[1:]), 255, dtype=torch.uint8)]
    picture = Image.fromarray(torch.cat(blocks).numpy())
    few = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def compared_clips(report: Path, count: int) -> Tensor:
    """Return clips (N T H W 3) uint8 of an evaluation: for each condition those of all candidates, in order."""
    compared = read_comparison(report)
    model = vae.load_vae(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    names = [latent_set_name(candidate, compared.seeds[0]) for candidate in compared.contestants[:SHOWN]]
    sets = [model.decoder.decode_batch(read_latent_rows(report / LATENTS_STORE, name, 0, count)) for name in names]
    return rearrange(sets, "k n t h w c -> (n k) t h w c")


def animation(clips: Tensor, labels: list[str], path: Path) -> None:
    """Write uint8 clips (N K T H W 3) of N conditions as one WebP with a labelled column for each of K candidates."""
    cells = torch.nn.functional.pad(
        clips.repeat_interleave(SCALE, -3).repeat_interleave(SCALE, -2), (0, 0, 0, GAP, 0, GAP), value=255
    )
    frames = rearrange(cells, "n k t h w c -> t (n h) (k w) c").numpy()
    font, width = ImageFont.load_default(LABEL_HEIGHT * 0.6), cells.shape[-2]
    pictures = []
    for frame in frames:
        picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + LABEL_HEIGHT), "white")
        picture.paste(Image.fromarray(frame), (0, LABEL_HEIGHT))
        for column, label in enumerate(labels):
            ImageDraw.Draw(picture).text(((column + 0.5) * width, LABEL_HEIGHT / 2), label, "black", font, anchor="mm")
        pictures.append(picture)
    durations = [round(1000 * FRAME_SECONDS)] * (len(pictures) - 1) + [round(1000 * PAUSE_SECONDS)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=80, method=6)


def clearest_conditions(report: Path, count: int) -> list[int]:
    """The conditions in which the student is nearer to the teacher than the undistilled student by most."""
    compared = read_comparison(report)
    sets = {item.name: latent_set_name(item, compared.seeds[0]) for item in compared.contestants}
    teacher, before, after = (
        read_latent_rows(report / LATENTS_STORE, sets[name], 0, compared.count) for name in MOVING
    )
    gain = rms_distance(before, teacher) - rms_distance(after, teacher)
    return gain.topk(count).indices.tolist()


def moving_clips(report: Path, count: int) -> tuple[Tensor, list[str]]:
    """Clips (N K T H W 3) uint8 of the clearest conditions, and the labels of the K candidates."""
    compared = read_comparison(report)
    items = {item.name: item for item in compared.contestants}
    model = vae.load_vae(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    rows, store = clearest_conditions(report, count), report / LATENTS_STORE
    names = [latent_set_name(items[name], compared.seeds[0]) for name in MOVING]
    latents = [torch.cat([read_latent_rows(store, name, row, row + 1) for row in rows]) for name in names]
    clips = torch.stack([model.decoder.decode_batch(part) for part in latents], dim=1)
    return clips, [items[name].label for name in MOVING]


def main() -> None:
    """Draw conditions of an evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--count", type=int, default=6, help="conditions")
    options = parser.parse_args()
    if not (options.report / COMPARISON_FILE).is_file():
        parser.error(f"{options.report}: contains no {COMPARISON_FILE}; name the --out folder of evaluate")
    if options.picture.suffix == ".webp":
        animation(*moving_clips(options.report, options.count), options.picture)
    else:
        sheet(compared_clips(options.report, options.count), options.picture, gap_every=SHOWN)


if __name__ == "__main__":
    main()
