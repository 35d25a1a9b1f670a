"""Writes report.json and report.html of an evaluation, from the files that sampling and decoding wrote to OUT.

The page is one HTML file without external addresses, with its videos embedded, for light and dark screens.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load as load_tensors
from torch import Tensor

from common.files import write_file
from shards import latent_store
from shards.comparison import LATENTS_STORE, Candidate, Comparison, latent_set_name, read_comparison
from stage2_distill.evaluation.compare import SELECTION_FILE
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import (
    CandidateScores,
    SeedStatistics,
    frechet_distance,
    score_candidates,
    seed_statistics,
)

REPORT_FILE, PAGE_FILE, VIDEOS_FOLDER = "report.json", "report.html", "videos"
PIXELS_FILE, I3D_FILE = "pixels.json", "i3d.safetensors"  # written by stage1_encode/video_metrics
# Columns of the page's first table, and their titles.
LATENT_METRICS = ("frechet", "times_floor", "to_teacher", "diversity", "evaluations", "seconds")
LATENT_TITLES = ("distance", "times the floor", "to teacher, same noise", "diversity", "evaluations", "s per video")
ABSOLUTE_METRICS, RATIO_METRICS = ("psnr", "clip"), ("motion", "saturation", "contrast")  # ratios to the teacher's
MIN_CONDITIONS = 2048  # with 192, 4 steps of a teacher could not be told from 50
SMALLEST_DIVISOR = 1e-12  # a teacher without motion, say, must not fail the report
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#6a737d;--line:#d8dee4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#14171a;--soft:#9aa4ae;--line:#343b42}}
*{box-sizing:border-box}body{margin:0 auto;max-width:75rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}p{max-width:44rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.7rem}figure{margin:0}
figcaption,.soft{font-size:.85rem;color:var(--soft)}video{width:100%;display:block;border-radius:4px}
"""
# Browsers may ignore `autoplay`, so the script starts the videos too.
SCRIPT = "for(const v of document.querySelectorAll('video'))v.play().catch(()=>{});"

Metric: TypeAlias = SeedStatistics | float | None  # None = not measured


@dataclass(frozen=True)
class CandidateReport:
    """All results of one candidate."""

    label: str
    metrics: dict[str, Metric]  # by their names in report.json
    answers: dict[str, SeedStatistics]  # share of true answers of the judge, by question


@dataclass(frozen=True)
class EvaluationReport:
    """All results of an evaluation."""

    comparison: Comparison
    floor: SeedStatistics  # distance between sets of the teacher itself
    candidates: tuple[CandidateReport, ...]  # in the order of the comparison
    videos: int  # decoded videos per set
    shown: int  # conditions whose videos are on the page
    selection: list[dict[str, Any]] | None  # content of selection.json


def write_report(config: EvaluateConfig) -> Path:
    """Write OUT/report.json and OUT/report.html; return the path of the latter."""
    out = Path(config.out)
    report = build_report(out, with_videos=config.videos > 0, with_selection=config.select)
    # The JSON encoder calls `vars` for the records that it does not know: SeedStatistics.
    text = json.dumps(report_content(report), indent=1, ensure_ascii=False, default=vars)
    write_file(out / REPORT_FILE, (text + "\n").encode())
    write_file(out / PAGE_FILE, render_page(out, report).encode())
    return out / PAGE_FILE


def build_report(out: Path, *, with_videos: bool, with_selection: bool) -> EvaluationReport:
    """Collect the results from the files in OUT."""
    comparison = read_comparison(out)
    scores = score_candidates(out / LATENTS_STORE, comparison)
    teacher = scores[comparison.teacher.name]
    pixels: dict[str, Any] = {"videos": 0, "shown": 0}
    if with_videos:
        pixels = json.loads((out / PIXELS_FILE).read_bytes())
    features = load_tensors((out / I3D_FILE).read_bytes()) if pixels.get("i3d") else {}
    candidates = []
    for candidate in comparison.contestants:
        metrics = {"evaluations": candidate.evaluations, **latent_summary(scores[candidate.name], teacher)}
        answers: dict[str, SeedStatistics] = {}
        if with_videos:
            own, others = (
                [pixels["sets"][latent_set_name(one, seed)] for seed in comparison.seeds]
                for one in (candidate, comparison.teacher)
            )
            metrics |= pixel_summary(own, others)
            answers = answer_summary(own)
        if features:
            metrics["fvd"] = frechet_video_distance(features, comparison, candidate)
        candidates.append(CandidateReport(candidate.label, metrics, answers))
    selection = json.loads((out / SELECTION_FILE).read_bytes()) if with_selection else None
    floor = seed_statistics(teacher.frechet)
    return EvaluationReport(comparison, floor, tuple(candidates), pixels["videos"], pixels["shown"], selection)


def report_content(report: EvaluationReport) -> dict[str, object]:
    """The content of report.json; each candidate is one flat object."""
    comparison, contestants = report.comparison, {}
    for candidate, one in zip(comparison.contestants, report.candidates, strict=True):
        answers = {"answers": one.answers} if report.videos else {}
        contestants[candidate.name] = {"label": one.label, **one.metrics, **answers}
    return {
        "count": comparison.count,
        "seeds": comparison.seeds,
        "guidance_scale": comparison.guidance_scale,
        "videos": report.videos,
        "floor": report.floor,
        "contestants": contestants,
        "selection": report.selection,
    }


def latent_summary(own: CandidateScores, teacher: CandidateScores) -> dict[str, Metric]:
    """Metrics of one candidate's latents."""
    floor = seed_statistics(teacher.frechet).mean
    ratio = None if own.diversity is None else own.diversity / max(teacher.diversity or 0.0, SMALLEST_DIVISOR)
    return {
        "seconds": own.seconds,
        "frechet": seed_statistics(own.frechet),
        "times_floor": sum(own.frechet) / len(own.frechet) / max(floor, SMALLEST_DIVISOR),
        "to_teacher": seed_statistics(own.to_teacher),
        "diversity": own.diversity,
        "diversity_of_teacher": ratio,
    }


def pixel_summary(own: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Pixel metrics over the seeds, from the sets' entries in pixels.json; some are relative to the teacher's."""
    metrics: dict[str, Metric] = {}
    for key in ABSOLUTE_METRICS:
        metrics[key] = None if own[0][key] is None else seed_statistics([one[key] for one in own])
    for key in RATIO_METRICS:
        pairs = zip(own, teacher, strict=True)
        metrics[key] = seed_statistics([one[key] / max(other[key], SMALLEST_DIVISOR) for one, other in pairs])
    return metrics


def answer_summary(own: Sequence[Mapping[str, Any]]) -> dict[str, SeedStatistics]:
    """Share of true answers over the seeds, by question; a seed without the question does not count."""
    answers = [one["answers"] for one in own]
    questions = sorted({question for one in answers for question in one})
    return {key: seed_statistics([one[key] for one in answers if key in one]) for key in questions}


def frechet_video_distance(
    features: Mapping[str, Tensor], comparison: Comparison, candidate: Candidate
) -> SeedStatistics:
    """Frechet distance of I3D features (N D), by set, to the teacher's set of another seed."""
    pairs = zip(comparison.seeds, comparison.references, strict=True)
    names = [(latent_set_name(candidate, a), latent_set_name(comparison.teacher, b)) for a, b in pairs]
    return seed_statistics([frechet_distance(features[own], features[other]) for own, other in names])


def format_metric(value: Metric) -> str:
    """A number, or a mean with its standard deviation, to a few digits; `-` for None."""
    if value is None:
        return "-"
    if not isinstance(value, SeedStatistics):
        return f"{value:.4g}"
    return f"{value.mean:.4g}" + ("" if value.deviation is None else f" ± {value.deviation:.2g}")


def render_page(out: Path, report: EvaluationReport) -> str:
    """The HTML page."""
    comparison = report.comparison
    deviation = " ± standard deviation" if len(comparison.seeds) > 1 else ""
    summary = (
        f"<p>{comparison.count} conditions, seeds {', '.join(map(str, comparison.seeds))}, guidance scale "
        f"{comparison.guidance_scale:g}. Values are the mean{deviation} over the seeds. "
        "The distance is the Frechet distance of latents, by fixed random features, to the teacher's videos of "
        f"another seed; the floor, {format_metric(report.floor)}, is that between two sets of the teacher itself.</p>"
    )
    if comparison.count < MIN_CONDITIONS:
        problem = "the distance cannot tell a good sampler from the floor"
        summary += f"<p><b>With fewer than {MIN_CONDITIONS} conditions {problem}.</b></p>"
    latent_rows = [
        (one.label, *(format_metric(one.metrics[key]) for key in LATENT_METRICS)) for one in report.candidates
    ]
    sections = [("Distance to the teacher", summary + html_table(("", *LATENT_TITLES), latent_rows))]
    if report.videos:
        sections += [("Videos", video_section(out, report)), ("Pixel metrics", pixel_table(report))]
    if report.selection:
        rows = [(one["checkpoint"], format_metric(seed_statistics(one["values"]))) for one in report.selection]
        sections.append(("Checkpoints", html_table(("checkpoint", "distance"), rows)))
    return html_page("Student against teacher", sections)


def pixel_table(report: EvaluationReport) -> str:
    """The table of pixel metrics, without those that no candidate has."""
    keys = [
        key
        for key in ("fvd", *ABSOLUTE_METRICS, *RATIO_METRICS)
        if any(one.metrics.get(key) is not None for one in report.candidates)
    ]
    questions = sorted({question for one in report.candidates for question in one.answers})
    rows = []
    for one in report.candidates:
        values = [one.metrics.get(key) for key in keys] + [one.answers.get(question) for question in questions]
        rows.append((one.label, *map(format_metric, values)))
    titles = [f"{key} / teacher's" if key in RATIO_METRICS else key for key in keys]
    note = f"{report.videos} videos per set. psnr compares frame 0 with the given one as the VAE decodes it."
    return f'<p class="soft">{note}</p>' + html_table(("", *titles, *questions), rows)


def video_section(out: Path, report: EvaluationReport) -> str:
    """The videos of each condition side by side, all from the noise of the first seed."""
    comparison = report.comparison
    names = [(latent_set_name(one, comparison.seeds[0]), one.label) for one in comparison.contestants]
    prompts = latent_store.describe_group(out / LATENTS_STORE, names[0][0]).prompts
    parts = []
    for row, prompt in enumerate(prompts[: report.shown]):
        figures = "".join(html_video(out / VIDEOS_FOLDER / name / f"{row:03d}.mp4", label) for name, label in names)
        parts.append(f'<p>{html.escape(prompt)}</p><div class="row">{figures}</div>')
    return "".join(parts)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def html_video(path: Path, label: str) -> str:
    """A playing video with its label."""
    source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    video = f'<video src="{source}" autoplay loop muted playsinline controls></video>'
    return f"<figure>{video}<figcaption>{html.escape(label)}</figcaption></figure>"


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The complete file from (heading, HTML) sections."""
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
