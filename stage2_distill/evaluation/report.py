"""report.json and report.html of an evaluation, from the files that sampling and decoding left in OUT.

The page is one HTML file without outside addresses, videos inside, light and dark.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors

from common.files import write_file
from shards import latent_store
from shards.comparison import LATENTS_STORE, Comparison, latent_set_name, read_comparison
from stage2_distill.evaluation.compare import SELECTION
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import Scores, frechet, score, spread
from stage2_distill.monitoring.metrics_log import METRICS, whole_lines

REPORT, PAGE = "report.json", "report.html"
RATIOS = ("motion", "saturation", "contrast")  # stated relative to the teacher's
PLAIN = ("psnr", "perceptual", "clip")
ENOUGH = 2048  # conditions; 192 could not tell 4 steps of a teacher from 50
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


def write_report(config: EvaluateConfig) -> Path:
    """Write OUT/report.json and OUT/report.html; the latter's path."""
    out = Path(config.out)
    contest = read_comparison(out)
    scores = score(out / LATENTS_STORE, contest)
    pixels = read_json(out / "pixels.json") if config.videos else None
    floor = spread(scores["teacher"].frechet)
    rows: dict[str, Any] = {}
    for contestant in contest.contestants:
        figures = latent_figures(scores[contestant.name], scores["teacher"], floor.mean)
        rows[contestant.name] = {"label": contestant.label, "evaluations": contestant.evaluations, **figures}
        if pixels:
            rows[contestant.name] |= pixel_figures(contest, pixels["sets"], contestant.sets)
        if pixels and pixels["i3d"]:
            rows[contestant.name]["fvd"] = vars(video_distance(out, contest, contestant.sets))
    report: dict[str, Any] = {
        "count": contest.count,
        "seeds": list(contest.seeds),
        "guidance_scale": contest.guidance_scale,
        "videos": pixels["videos"] if pixels else 0,
        "floor": vars(floor),
        "contestants": rows,
        "selection": read_json(out / SELECTION) if config.select else None,
    }
    write_file(out / REPORT, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_file(out / PAGE, render(config, contest, report, pixels["shown"] if pixels else 0).encode())
    return out / PAGE


def read_json(path: Path) -> Any:  # noqa: ANN401
    """The content of a JSON file."""
    return json.loads(path.read_bytes())


def latent_figures(own: Scores, teacher: Scores, floor: float) -> dict[str, Any]:
    """What the latents of one contestant say."""
    shares = None if own.diversity is None else own.diversity / max(teacher.diversity or 0.0, 1e-12)
    return {
        "seconds": own.seconds,
        "frechet": vars(spread(own.frechet)),
        "times_floor": sum(own.frechet) / len(own.frechet) / max(floor, 1e-12),
        "to_teacher": vars(spread(own.to_teacher)),
        "diversity": own.diversity,
        "diversity_of_teacher": shares,
    }


def pixel_figures(contest: Comparison, found: dict[str, Any], sets: str) -> dict[str, Any]:
    """Means over the seeds of one contestant's pixel figures; some are relative to the teacher's."""
    mine = [found[f"{sets}-seed-{seed}"] for seed in contest.seeds]
    theirs = [found[latent_set_name(contest.teacher, seed)] for seed in contest.seeds]
    rows: dict[str, Any] = {}
    for key in PLAIN:
        rows[key] = vars(spread([one[key] for one in mine])) if mine[0][key] is not None else None
    for key in RATIOS:
        ratios = [one[key] / max(other[key], 1e-12) for one, other in zip(mine, theirs, strict=True)]
        rows[key] = vars(spread(ratios))
    keys = sorted({key for one in mine for key in one["answers"]})
    rows["answers"] = {
        key: vars(spread([one["answers"][key] for one in mine if key in one["answers"]])) for key in keys
    }
    return rows


def video_distance(out: Path, contest: Comparison, sets: str) -> Any:  # noqa: ANN401
    """Frechet distance of I3D features to the teacher's set of another seed."""
    features = load_tensors((out / "i3d.safetensors").read_bytes())
    pairs = zip(contest.seeds, contest.references, strict=True)
    return spread(
        [frechet(features[f"{sets}-seed-{a}"], features[latent_set_name(contest.teacher, b)]) for a, b in pairs]
    )


def shown(figure: Any) -> str:  # noqa: ANN401
    """A number, or a mean with its standard deviation, in a few digits."""
    if figure is None:
        return "-"
    if isinstance(figure, dict):
        deviation = figure["deviation"]
        return f"{figure['mean']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")
    return f"{figure:.4g}"


def render(config: EvaluateConfig, contest: Comparison, report: dict[str, Any], rows: int) -> str:
    """The page."""
    few = len(contest.seeds) < 2
    said = (
        f"<p>{contest.count} conditions, seeds {', '.join(map(str, contest.seeds))}, guidance scale "
        f"{contest.guidance_scale:g}. Figures are the mean{'' if few else ' ± standard deviation'} over the seeds. "
        f"Distance: Frechet distance of latents, by fixed random features, to the teacher's videos of another seed; "
        f"between two sets of the teacher itself it is {shown(report['floor'])}, the floor.</p>"
    )
    if contest.count < ENOUGH:
        said += f"<p><b>Under {ENOUGH} conditions the distance cannot tell a good sampler from the floor.</b></p>"
    sections = [("Distance to the teacher", said + distances(report))]
    if report["videos"]:
        sections += [("Videos", videos(config, contest, rows)), ("In pixels", pixel_table(report))]
    if report["selection"]:
        lines = [(one["checkpoint"], shown(one)) for one in report["selection"]]
        sections.append(("Checkpoints", table(("checkpoint", "distance"), lines)))
    drawn = curves(Path(config.checkpoint[0]))
    return page("Student against teacher", [*sections, *([("Training", drawn)] if drawn else [])])


def distances(report: dict[str, Any]) -> str:
    """The table of latent figures."""
    head = ("", "distance", "times the floor", "to teacher, same noise", "diversity", "evaluations", "s a video")
    keys = ("frechet", "times_floor", "to_teacher", "diversity", "evaluations", "seconds")
    return table(head, [(one["label"], *(shown(one[key]) for key in keys)) for one in report["contestants"].values()])


def pixel_table(report: dict[str, Any]) -> str:
    """The table of pixel figures."""
    rows = report["contestants"].values()
    kinds = [key for key in ("fvd", *PLAIN, *RATIOS) if any(one.get(key) is not None for one in rows)]
    asked = sorted({key for one in rows for key in one["answers"]})
    lines = [
        (one["label"], *(shown(one[key]) for key in kinds), *(shown(one["answers"].get(key)) for key in asked))
        for one in rows
    ]
    names = [f"{kind} / teacher's" if kind in RATIOS else kind for kind in kinds]
    note = (
        f'<p class="soft">Of {report["videos"]} videos a set. psnr and perceptual compare frame 0 with the given one '
    )
    return (
        note + "as the VAE shows it; perceptual is LPIPS with random features.</p>" + table(("", *names, *asked), lines)
    )


def videos(config: EvaluateConfig, contest: Comparison, rows: int) -> str:
    """The same conditions and noise, contestant beside contestant."""
    out = Path(config.out)
    names = [(latent_set_name(one, contest.seeds[0]), one.label) for one in contest.contestants]
    prompts = latent_store.describe_group(out / LATENTS_STORE, names[0][0]).prompts
    parts = []
    for row in range(rows):
        figures = "".join(video(out / "videos" / name / f"{row:03d}.mp4", label) for name, label in names)
        parts.append(f'<p>{html.escape(prompts[row])}</p><div class="row">{figures}</div>')
    return "".join(parts)


def curves(folder: Path) -> str:
    """Training losses and gradient norms from the run's metrics.jsonl, where it is there."""
    path = next((p / METRICS for p in (folder, folder.parent) if (p / METRICS).is_file()), folder / METRICS)
    lines = [line for _, line in whole_lines(path)]
    drawn = []
    for role in ("student", "critic"):
        for key in (f"{role}_loss", f"{role}_grad_norm"):
            points = [(one["iteration"], one[key]) for one in lines if key in one and math.isfinite(one[key])]
            drawn += [curve(key.replace("_", " "), points)] if points else []
    return f'<div class="row">{"".join(drawn)}</div>' if drawn else ""


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
