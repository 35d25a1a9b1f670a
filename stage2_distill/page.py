"""The page of a report: one HTML file without outside addresses, videos inside, light and dark."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#6a737d;--line:#d8dee4;--mark:#0b6bcb}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#14171a;--soft:#9aa4ae;--line:#343b42;--mark:#6db3ff}}
*{box-sizing:border-box}body{margin:0 auto;max-width:75rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}p{max-width:44rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.7rem}figure{margin:0}
figcaption,.soft{font-size:.85rem;color:var(--soft)}video{width:100%;display:block;border-radius:4px}
svg{width:100%;max-width:34rem;height:auto}svg text{fill:var(--soft);font-size:11px}
polyline{fill:none;stroke:var(--mark);stroke-width:1.5}
"""
SCRIPT = "for(const v of document.querySelectorAll('video'))v.play().catch(()=>{});"
WIDTH, HEIGHT, LEFT = 520, 160, 70  # of a curve
POINTS = 300


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def video(path: Path, label: str) -> str:
    """A playing video with its label."""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'src="data:video/mp4;base64,{data}"'
    return (
        f"<figure><video {source} autoplay loop muted playsinline controls></video>"
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
    )


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Points (x, y), y finite, as a small SVG; many are thinned out."""
    points = points[:: max(1, len(points) // POINTS)]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points, strict=True))
    wide, high = (x1 - x0) or 1, (y1 - y0) or 1
    place = [
        f"{LEFT + (x - x0) / wide * (WIDTH - LEFT - 10):.1f},{HEIGHT - 24 - (y - y0) / high * (HEIGHT - 40):.1f}"
        for x, y in points
    ]
    words = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in (
            (LEFT - 6, 20, "end", f"{y1:.3g}"),
            (LEFT - 6, HEIGHT - 24, "end", f"{y0:.3g}"),
            (LEFT, HEIGHT - 6, "start", f"{x0:g}"),
            (WIDTH - 10, HEIGHT - 6, "end", f"{x1:g}"),
        )
    )
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{words}<polyline points="{" ".join(place)}"/></svg>'
    return f"<figure>{drawn}<figcaption>{html.escape(title)}</figcaption></figure>"


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file from (heading, HTML) sections."""
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{inner}</section>" for heading, inner in sections)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    name = html.escape(title)
    return (
        f"{head}<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1>{body}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
