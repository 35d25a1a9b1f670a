"""Pictures for the model card: rows are clips, columns are frames. Shapes: N clips, T frames, H W pixels."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

COLUMNS = (0, 2, 4, 6, 8, 10, 12, 14, 16)


def sheet(clips: Tensor, path: Path, *, gap_every: int = 1) -> None:
    """Write uint8 clips (N T H W 3) as one PNG of 256 colours, a light line after every `gap_every` rows.

    The few pixels of an object must not lose their colours to the background's shades: hence MAXCOVERAGE.
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
