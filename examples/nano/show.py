"""Pictures of nano clips: rows are clips, columns are frames. Shapes: N clips, T frames, H W pixels.

`python -m examples.nano.show REPORT PICTURE` draws what `cli.py evaluate --out REPORT` compared: for each of the first
conditions the teacher at 50 steps, at 4, the undistilled student and the student, all with the first seed.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from shards.comparison import COMPARISON_FILE, LATENTS_STORE, latent_set_name, read_comparison
from shards.latent_store import read_latent_rows
from stage1_encode.models import vae

MODEL = Path("examples/nano/model")
SHOWN = 4  # candidates; further checkpoints come after the first student

COLUMNS = (0, 2, 4, 6, 8, 10, 12, 14, 16)


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
    sets = [vae.decode_video_batch(model, read_latent_rows(report / LATENTS_STORE, name, 0, count)) for name in names]
    return rearrange(sets, "k n t h w c -> (n k) t h w c")


def main() -> None:
    """Draw the first conditions of an evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--count", type=int, default=6, help="conditions")
    options = parser.parse_args()
    if not (options.report / COMPARISON_FILE).is_file():
        parser.error(f"{options.report}: contains no {COMPARISON_FILE}; name the --out folder of evaluate")
    sheet(compared_clips(options.report, options.count), options.picture, gap_every=SHOWN)


if __name__ == "__main__":
    main()
