"""How the distances of a run's checkpoints fall: the largest rise in between, and their curve."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

MAP_NAMES = ("convolutions", "tanh", "spectra")  # the first errors of a row of selection.json
DASHES = ("", "6 3", "2 3")  # a line's pattern, which needs no colour
WIDTH, HEIGHT, MARGIN = 560, 200, 28  # of the curve, in its own units
SMALLEST_DISTANCE = 1e-12


def checkpoint_distances(selection: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The distances in each map, checkpoint by checkpoint, from the rows of selection.json."""
    return {name: [float(row["errors"][index]) for row in selection] for index, name in enumerate(MAP_NAMES)}


def largest_rise(distances: Sequence[float]) -> float:
    """The largest share by which a checkpoint's distance exceeds that of the one before; 0 = they only fall."""
    pairs = zip(distances, distances[1:], strict=False)
    return max([0.0, *(after / max(before, SMALLEST_DISTANCE) - 1 for before, after in pairs)])


def rise_sentence(selection: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the largest rise between neighbours in each map."""
    rises = {name: largest_rise(values) for name, values in checkpoint_distances(selection).items()}
    text = ", ".join(f"{name} {rise:.0%}" for name, rise in rises.items())
    return f"Largest rise of the distance from one checkpoint to the next: {text}."


def draw_curve(selection: Sequence[Mapping[str, Any]]) -> str:
    """The distances over the first checkpoint's as an inline SVG, with a line for each map."""
    distances = checkpoint_distances(selection)
    shares = {name: [one / max(values[0], SMALLEST_DISTANCE) for one in values] for name, values in distances.items()}
    top = max(SMALLEST_DISTANCE, *(max(values) for values in shares.values()))
    step = (WIDTH - 2 * MARGIN) / max(1, len(selection) - 1)
    content = ""
    for index, (name, values) in enumerate(shares.items()):
        points = [
            (MARGIN + step * i, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * one / top) for i, one in enumerate(values)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        stroke = f'fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="{DASHES[index]}"'
        content += f'<polyline points="{path}" {stroke}/>'
        x = MARGIN + 150 * index
        content += f'<line x1="{x}" y1="12" x2="{x + 30}" y2="12" {stroke}/>'
        content += f'<text x="{x + 36}" y="16" font-size="12" fill="currentColor">{html.escape(name)}</text>'
    for x, anchor, row in ((MARGIN, "start", selection[0]), (WIDTH - MARGIN, "end", selection[-1])):
        label = html.escape(str(row["checkpoint"]))
        content += (
            f'<text x="{x}" y="{HEIGHT - 8}" font-size="12" text-anchor="{anchor}" fill="currentColor">{label}</text>'
        )
    title = "Distances of the checkpoints in three maps, over those of the first"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px"'
    return f'<svg {size} role="img"><title>{title}</title>{content}</svg>'
