"""Draws what a student leaves that its teacher does not: `python -m examples.nano.signature REPORT PICTURE`.

REPORT is the `--out` folder of `cli.py evaluate`. `--students NAME=LABEL ...` chooses its students by part of a name.
Above, the variance of a token (2 x 2 latents) over the teacher's, direction by direction from the largest to the
smallest: 1 everywhere if a student makes what its teacher makes. Below, for one condition and the same noise, a frame
of each and what the smallest quarter of the directions adds to it, amplified.
Shapes: N clips, C channels, T latent frames, H W latent size, D = 4 C directions, F frames, X Y pixels.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shards.comparison import COMPARISON_FILE, LATENTS_STORE, Comparison, latent_set_name, read_comparison
from shards.latent_store import read_latent_rows
from stage1_encode.models import vae

MODEL = Path("examples/nano/model")
BAND = 8  # directions that share a point of the curve
COLOURS = ("#888888", "#c0392b", "#1f6fb2", "#1e8449")  # the teacher's other seeds first
WIDTH, HEIGHT, MARGIN = 800, 280, 44  # of the curves
HIGHEST = 8.0  # ratio at the top; the axis is logarithmic, and 1/2 at the bottom
FRAME, SCALE, AMPLIFIED = 12, 2, 60  # which frame is shown, pixels per pixel, and how much of the difference
TEXT_SIZE = 14


def tokens(latents: Tensor) -> Tensor:
    """Tokens (R D) float64 of the free frames of latents (N C T H W)."""
    return rearrange(latents[:, :, 1:].double(), "n c t (h p) (w q) -> (n t h w) (c p q)", p=2, q=2)


def principal_directions(latents: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D) of tokens, and their principal directions (D D), a column each, the largest variance first."""
    rows = tokens(latents)
    _, vectors = torch.linalg.eigh(torch.cov(rows.T))
    return rows.mean(dim=0), vectors.flip(1)


def variance_ratios(latents: Tensor, reference: Tensor, directions: Tensor) -> Tensor:
    """Variances of tokens over those of the reference's, in bands of `BAND` directions, (D / BAND)."""
    own, other = (((tokens(one) @ directions).var(dim=0)) for one in (latents, reference))
    return (own / other).log().reshape(-1, BAND).mean(dim=1).exp()


def without_smallest(latents: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Latents (N C T H W) whose free frames have nothing in the smallest quarter of the directions."""
    kept = directions[:, : directions.shape[1] * 3 // 4]
    flat = (tokens(latents) - mean) @ kept @ kept.T + mean
    frames, height, width = latents.shape[2] - 1, latents.shape[3] // 2, latents.shape[4] // 2
    shape = {"t": frames, "h": height, "w": width, "p": 2, "q": 2}
    free = rearrange(flat, "(n t h w) (c p q) -> n c t (h p) (w q)", **shape)
    return torch.cat([latents[:, :, :1], free.float()], dim=2)


def read_sets(report: Path, compared: Comparison, sets: str, seeds: tuple[int, ...]) -> Tensor:
    """All clips (N C T H W) of a candidate, those of the given seeds one after the other."""
    names = [f"{sets}-seed-{seed}" for seed in seeds]
    return torch.cat([read_latent_rows(report / LATENTS_STORE, name, 0, compared.count) for name in names])


def draw_curves(curves: dict[str, Tensor]) -> Image.Image:
    """The ratios (D / BAND) by label, over the directions, on a logarithmic axis from 1/2 to `HIGHEST`."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    top, low = torch.tensor([HIGHEST, 0.5]).log2().tolist()

    def height(ratio: float) -> float:
        share = (torch.tensor(ratio).log2().item() - low) / (top - low)
        return HEIGHT - MARGIN - min(1.0, max(0.0, share)) * (HEIGHT - 2 * MARGIN)

    for ratio in (0.5, 1.0, 2.0, 4.0, 8.0):
        draw.line([(MARGIN, height(ratio)), (WIDTH - 8, height(ratio))], fill="#dddddd")
        draw.text((MARGIN - 6, height(ratio)), f"{ratio:g}", "black", font, anchor="rm")
    for index, (label, ratios) in enumerate(curves.items()):
        step = (WIDTH - 8 - MARGIN) / (len(ratios) - 1)
        draw.line([(MARGIN + step * i, height(r)) for i, r in enumerate(ratios.tolist())], fill=COLOURS[index], width=2)
        spot = (MARGIN + 8, MARGIN + 20 * index)
        draw.rectangle(draw.textbbox(spot, label, font, anchor="lm"), "white")  # above the lines of the axis
        draw.text(spot, label, COLOURS[index], font, anchor="lm")
    title = "variance of a token's directions, over the teacher's"
    draw.text((WIDTH / 2, 14), title, "black", font, anchor="mm")
    draw.text(
        (WIDTH / 2, HEIGHT - 18), "direction, from the largest variance to the smallest", "black", font, anchor="mm"
    )
    return picture


def draw_frames(latents: dict[str, Tensor], mean: Tensor, directions: Tensor) -> Image.Image:
    """A frame of each clip (1 C T H W) by label; below it, amplified around grey, what its smallest quarter adds."""
    model = vae.load_vae(MODEL, dtype=torch.float32, device=torch.device("cpu"))
    columns: list[Tensor] = []
    for clip in latents.values():
        both = torch.cat([clip, without_smallest(clip, mean, directions)])
        whole, rest = model.decoder.decode_batch(both)[:, FRAME].int()
        added = (128 + AMPLIFIED * (whole - rest)).clamp(0, 255)
        columns.append(torch.cat([whole, torch.full_like(whole[:2], 255), added]))
    column_width = WIDTH // len(columns)
    size = (columns[0].shape[1] * SCALE, columns[0].shape[0] * SCALE)
    picture = Image.new("RGB", (WIDTH, size[1] + 24), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    for index, (label, column) in enumerate(zip(latents, columns, strict=True)):
        cell = Image.fromarray(column.to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)
        left = column_width * index + (column_width - size[0]) // 2
        picture.paste(cell, (left, 24))
        draw.text((left + size[0] / 2, 12), label, "black", font, anchor="mm")
    return picture


def draw_signature(report: Path, students: dict[str, str], row: int) -> Image.Image:
    """The whole picture; `students` are labels by part of the name of a candidate's sets."""
    compared = read_comparison(report)
    first, *others = compared.seeds
    found = {
        label: next(one.sets for one in compared.contestants if part in one.sets) for part, label in students.items()
    }
    teacher = read_sets(report, compared, compared.teacher.sets, compared.seeds)
    mean, directions = principal_directions(teacher)
    control = read_sets(report, compared, compared.teacher.sets, tuple(others))
    curves = {"teacher, other seeds": variance_ratios(control, teacher, directions)}
    for label, sets in found.items():
        curves[label] = variance_ratios(read_sets(report, compared, sets, compared.seeds), teacher, directions)
    names = {"teacher": latent_set_name(compared.teacher, first)}
    names |= {label: f"{sets}-seed-{first}" for label, sets in found.items()}
    clips = {label: read_latent_rows(report / LATENTS_STORE, name, row, row + 1) for label, name in names.items()}
    above, below = draw_curves(curves), draw_frames(clips, mean, directions)
    picture = Image.new("RGB", (WIDTH, above.height + below.height), "white")
    picture.paste(above, (0, 0))
    picture.paste(below, (0, above.height))
    return picture


def main() -> None:
    """Draw the signature of students of an evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--students", nargs="+", default=["run=student"], help="NAME=LABEL, three at most")
    parser.add_argument("--row", type=int, default=0, help="the condition whose frames are shown")
    options = parser.parse_args()
    if not (options.report / COMPARISON_FILE).is_file():
        parser.error(f"{options.report}: contains no {COMPARISON_FILE}; name the --out folder of evaluate")
    students = dict(one.partition("=")[::2] for one in options.students)
    draw_signature(options.report, students, options.row).save(options.picture, quality=85, method=6)


if __name__ == "__main__":
    main()
