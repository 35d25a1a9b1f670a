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
from stage2_distill.evaluation.compare import SELECTION_FILE
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import (
    CandidateScores,
    frechet_distance,
    score_candidates,
    seed_statistics,
)
from stage2_distill.monitoring.metrics_log import METRICS_FILE, complete_lines

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
RATIO_METRICS = ("motion", "saturation", "contrast")  # stated relative to the teacher's
ABSOLUTE_METRICS = ("psnr", "clip")
MIN_CONDITIONS = 2048  # conditions; 192 could not tell 4 steps of a teacher from 50
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
    comparison = read_comparison(out)
    scores = score_candidates(out / LATENTS_STORE, comparison)
    pixels = read_json(out / "pixels.json") if config.videos else None
    floor = seed_statistics(scores["teacher"].frechet)
    rows: dict[str, Any] = {}
    for candidate in comparison.contestants:
        figures = latent_summary(scores[candidate.name], scores["teacher"], floor.mean)
        rows[candidate.name] = {"label": candidate.label, "evaluations": candidate.evaluations, **figures}
        if pixels:
            rows[candidate.name] |= pixel_summary(comparison, pixels["sets"], candidate.sets)
        if pixels and pixels["i3d"]:
            rows[candidate.name]["fvd"] = vars(frechet_video_distance(out, comparison, candidate.sets))
    report: dict[str, Any] = {
        "count": comparison.count,
        "seeds": list(comparison.seeds),
        "guidance_scale": comparison.guidance_scale,
        "videos": pixels["videos"] if pixels else 0,
        "floor": vars(floor),
        "contestants": rows,
        "selection": read_json(out / SELECTION_FILE) if config.select else None,
    }
    write_file(out / REPORT_FILE, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_file(out / PAGE_FILE, render_page(config, comparison, report, pixels["shown"] if pixels else 0).encode())
    return out / PAGE_FILE


def read_json(path: Path) -> Any:  # noqa: ANN401
    """The content of a JSON file."""
    return json.loads(path.read_bytes())


def latent_summary(own: CandidateScores, teacher: CandidateScores, floor: float) -> dict[str, Any]:
    """What the latents of one contestant say."""
    shares = None if own.diversity is None else own.diversity / max(teacher.diversity or 0.0, 1e-12)
    return {
        "seconds": own.seconds,
        "frechet": vars(seed_statistics(own.frechet)),
        "times_floor": sum(own.frechet) / len(own.frechet) / max(floor, 1e-12),
        "to_teacher": vars(seed_statistics(own.to_teacher)),
        "diversity": own.diversity,
        "diversity_of_teacher": shares,
    }


def pixel_summary(comparison: Comparison, set_metrics: dict[str, Any], sets: str) -> dict[str, Any]:
    """Means over the seeds of one contestant's pixel figures; some are relative to the teacher's."""
    own = [set_metrics[f"{sets}-seed-{seed}"] for seed in comparison.seeds]
    teacher = [set_metrics[latent_set_name(comparison.teacher, seed)] for seed in comparison.seeds]
    rows: dict[str, Any] = {}
    for key in ABSOLUTE_METRICS:
        rows[key] = vars(seed_statistics([one[key] for one in own])) if own[0][key] is not None else None
    for key in RATIO_METRICS:
        ratios = [one[key] / max(other[key], 1e-12) for one, other in zip(own, teacher, strict=True)]
        rows[key] = vars(seed_statistics(ratios))
    keys = sorted({key for one in own for key in one["answers"]})
    rows["answers"] = {
        key: vars(seed_statistics([one["answers"][key] for one in own if key in one["answers"]])) for key in keys
    }
    return rows


def frechet_video_distance(out: Path, comparison: Comparison, sets: str) -> Any:  # noqa: ANN401
    """Frechet distance of I3D features to the teacher's set of another seed."""
    features = load_tensors((out / "i3d.safetensors").read_bytes())
    pairs = zip(comparison.seeds, comparison.references, strict=True)
    return seed_statistics(
        [
            frechet_distance(features[f"{sets}-seed-{a}"], features[latent_set_name(comparison.teacher, b)])
            for a, b in pairs
        ]
    )


def format_metric(figure: Any) -> str:  # noqa: ANN401
    """A number, or a mean with its standard deviation, in a few digits."""
    if figure is None:
        return "-"
    if isinstance(figure, dict):
        deviation = figure["deviation"]
        return f"{figure['mean']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")
    return f"{figure:.4g}"


def render_page(config: EvaluateConfig, comparison: Comparison, report: dict[str, Any], rows: int) -> str:
    """The page."""
    single_seed = len(comparison.seeds) < 2
    summary = (
        f"<p>{comparison.count} conditions, seeds {', '.join(map(str, comparison.seeds))}, guidance scale "
        f"{comparison.guidance_scale:g}. Figures are the mean{'' if single_seed else ' ± standard deviation'} over the seeds. "
        f"Distance: Frechet distance of latents, by fixed random features, to the teacher's videos of another seed; "
        f"between two sets of the teacher itself it is {format_metric(report['floor'])}, the floor.</p>"
    )
    if comparison.count < MIN_CONDITIONS:
        summary += (
            f"<p><b>Under {MIN_CONDITIONS} conditions the distance cannot tell a good sampler from the floor.</b></p>"
        )
    sections = [("Distance to the teacher", summary + distance_table(report))]
    if report["videos"]:
        sections += [("Videos", video_section(config, comparison, rows)), ("In pixels", pixel_table(report))]
    if report["selection"]:
        lines = [(one["checkpoint"], format_metric(one)) for one in report["selection"]]
        sections.append(("Checkpoints", html_table(("checkpoint", "distance"), lines)))
    drawn = curves(Path(config.checkpoint[0]))
    return html_page("Student against teacher", [*sections, *([("Training", drawn)] if drawn else [])])


def distance_table(report: dict[str, Any]) -> str:
    """The table of latent figures."""
    head = ("", "distance", "times the floor", "to teacher, same noise", "diversity", "evaluations", "s a video")
    keys = ("frechet", "times_floor", "to_teacher", "diversity", "evaluations", "seconds")
    return html_table(
        head, [(one["label"], *(format_metric(one[key]) for key in keys)) for one in report["contestants"].values()]
    )


def pixel_table(report: dict[str, Any]) -> str:
    """The table of pixel figures."""
    rows = report["contestants"].values()
    kinds = [key for key in ("fvd", *ABSOLUTE_METRICS, *RATIO_METRICS) if any(one.get(key) is not None for one in rows)]
    questions = sorted({key for one in rows for key in one["answers"]})
    lines = [
        (
            one["label"],
            *(format_metric(one[key]) for key in kinds),
            *(format_metric(one["answers"].get(key)) for key in questions),
        )
        for one in rows
    ]
    names = [f"{kind} / teacher's" if kind in RATIO_METRICS else kind for kind in kinds]
    note = f"Of {report['videos']} videos per set. psnr compares frame 0 with the given one as the VAE decodes it."
    return f'<p class="soft">{note}</p>' + html_table(("", *names, *questions), lines)


def video_section(config: EvaluateConfig, comparison: Comparison, rows: int) -> str:
    """The same conditions and noise, contestant beside contestant."""
    out = Path(config.out)
    names = [(latent_set_name(one, comparison.seeds[0]), one.label) for one in comparison.contestants]
    prompts = latent_store.describe_group(out / LATENTS_STORE, names[0][0]).prompts
    parts = []
    for row in range(rows):
        figures = "".join(html_video(out / "videos" / name / f"{row:03d}.mp4", label) for name, label in names)
        parts.append(f'<p>{html.escape(prompts[row])}</p><div class="row">{figures}</div>')
    return "".join(parts)


def curves(folder: Path) -> str:
    """Training losses and gradient norms from the run's metrics.jsonl, where it is there."""
    path = next(
        (p / METRICS_FILE for p in (folder, folder.parent) if (p / METRICS_FILE).is_file()), folder / METRICS_FILE
    )
    lines = [line for _, line in complete_lines(path)]
    drawn = []
    for role in ("student", "critic"):
        for key in (f"{role}_loss", f"{role}_grad_norm"):
            points = [(one["iteration"], one[key]) for one in lines if key in one and math.isfinite(one[key])]
            drawn += [curve(key.replace("_", " "), points)] if points else []
    return f'<div class="row">{"".join(drawn)}</div>' if drawn else ""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def html_video(path: Path, label: str) -> str:
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


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
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
