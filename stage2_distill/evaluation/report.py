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

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from common.files import read_file, staged_output, write_file
from common.options import FULL_DECODER, write_config
from shards import latent_store
from shards.comparison import LATENTS_STORE, Comparison, latent_set_name, read_comparison
from stage2_distill.evaluation import latent_metrics
from stage2_distill.evaluation.checkpoint_curve import MAP_NAMES, draw_curve, rise_sentence
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.latent_metrics import CandidateScores, SeedStatistics, seed_statistics
from stage2_distill.evaluation.selection import SELECTION_FILE
from stage2_distill.sampling.student_source import find_student

REPORT_FILE, PAGE_FILE, VIDEOS_FOLDER = "report.json", "report.html", "videos"
EVALUATION_CONFIG_FILE = "evaluate.yaml"
PIXELS_FILE, I3D_FILE = "pixels.json", "i3d.safetensors"  # written by stage1_encode/video_metrics
# Columns of the page's first table, and their titles.
LATENT_METRICS = ("frechet", "times_floor", "to_teacher", "diversity", "evaluations", "seconds")
LATENT_TITLES = (
    "distance ↓", "times the floor ↓", "to teacher, same noise ↓", "diversity ≈", "evaluations ↓", "s per video ↓",
)  # fmt: skip
# Columns of the tables of measures that see what the distance does not, and their titles.
MEASURES = {
    "floors": "floors, convolutions ↓",
    "floors_tanh": "floors, tanh ↓",
    "floors_spectral": "floors, spectra ↓",
    "accuracy": "told apart, whitened latents ↓",
    "accuracy_plain": "told apart, latents ↓",
    "accuracy_pixels": "told apart, pixels ↓",
}
RATIOS = {
    "sharpness": "sharpness ≈",
    "temporal_variance": "temporal variance ≈",
    "latent_contrast": "contrast ≈",
    "diversity_of_teacher": "diversity ≈",
}
MEASURE_NOTE = (
    "No single measure decides. Three distances in different maps, each over the teacher's own; the share of held-out "
    "videos that a small classifier tells from the teacher's of another seed, 0.5 = it cannot: of latents, whitened, "
    "where any error of one step shows however small it is, and as they are; of decoded pixels, whitened. The others "
    "are ratios to the teacher's on the same conditions, of latents. In brackets the 95 % interval over the seeds, of "
    "accuracies over the conditions too. `to teacher, same noise` above is no order: the mean of all answers is "
    "nearest to every one, so it prefers blurred students."
)
SELECTION_NOTE = (
    "The rank is the mean of the ranks by each of these measures (1 = nearest to the teacher in all), on other "
    "conditions than those of the tables above. Of the classifiers that of latents as they are counts; the whitened "
    "one, which is near 1 for every student of few steps, is shown as information."
)
ABSOLUTE_METRICS, RATIO_METRICS = ("psnr", "clip"), ("motion", "saturation", "contrast")  # ratios to the teacher's
DIRECTIONS = {"fvd": "↓", "psnr": "↑", "clip": "↑"}  # of the others closest to the teacher is best
LEGEND = "↓ lower is better, ↑ higher is better, ≈ best where it is closest to the teacher's (a ratio: to 1)."
MIN_CONDITIONS = 2048  # with 192, 4 steps of a teacher could not be told from 50
SMALLEST_DIVISOR = 1e-12  # a teacher without motion, say, must not fail the report
PAGE_START = """<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>Student against teacher</title><style>
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#6a737d;--line:#d8dee4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#14171a;--soft:#9aa4ae;--line:#343b42}}
*{box-sizing:border-box}body{margin:0 auto;max-width:75rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}p{max-width:44rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;min-width:9rem}th{overflow-wrap:break-word;color:var(--soft);font-weight:600}td+td{white-space:nowrap}
p,td:first-child,dd,figcaption{overflow-wrap:anywhere}dl{display:grid;grid-template-columns:auto 1fr;gap:0 1rem}
dt{color:var(--soft)}dd{margin:0}
@media(max-width:48rem){table,tbody,tr,td{display:block}tr:first-child{display:none}tr{margin-bottom:1rem}
td,td:first-child{display:flex;justify-content:space-between;gap:1rem;padding:.2rem 0;white-space:normal}
td:first-child{font-weight:600}td+td::before{content:attr(data-title);color:var(--soft);text-align:left}}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.7rem}figure{margin:0}
figcaption,.soft{font-size:.85rem;color:var(--soft)}video{width:100%;display:block;border-radius:4px}
</style></head><body><h1>Student against teacher</h1>"""
# Browsers may ignore `autoplay`, so the script starts the videos too.
SCRIPT = "<script>for(const v of document.querySelectorAll('video'))v.play().catch(()=>{});</script>"

Metric: TypeAlias = SeedStatistics | float | None  # None = not measured


@dataclass(frozen=True)
class EvaluationReport:
    """All results of an evaluation; the fields are the keys of report.json."""

    subject: dict[str, list[str]]  # what was compared: checkpoints, weights, model, data set
    count: int  # N, conditions
    seeds: tuple[int, ...]
    guidance_scale: float
    videos: int  # decoded videos per set
    floor: SeedStatistics  # distance between sets of the teacher itself
    contestants: dict[str, dict[str, Any]]  # the teacher first; by name: label, each metric, answers of the judge
    selection: list[dict[str, Any]] | None  # content of selection.json


def write_report(config: EvaluateConfig) -> Path:
    """Write OUT/report.json, OUT/report.html and OUT/evaluate.yaml; return the path of the page."""
    out, comparison = Path(config.out), read_comparison(Path(config.out))
    pixels = read_results(out / PIXELS_FILE) if config.videos else {"videos": 0, "shown": 0}
    selection = read_results(out / SELECTION_FILE) if config.select else None
    report = build_report(out, comparison, pixels, selection, report_subject(config), config.device)
    # The JSON encoder calls `vars` for the records that it does not know: EvaluationReport and SeedStatistics.
    text = json.dumps(report, indent=1, ensure_ascii=False, default=vars)
    page = render_page(report, video_section(out, comparison, pixels["shown"]))
    with staged_output(out) as staging:
        write_config(staging / EVALUATION_CONFIG_FILE, config)
        write_file(staging / REPORT_FILE, (text + "\n").encode())
        write_file(staging / PAGE_FILE, page.encode())
    return out / PAGE_FILE


# Columns of the summary in text: title, key of the candidate.
SUMMARY = {
    "whitened": "accuracy", "latents": "accuracy_plain", "pixels": "accuracy_pixels", "sharpness": "sharpness",
    "tanh": "floors_tanh", "spectra": "floors_spectral", "convolutions": "floors",
}  # fmt: skip


def summary_lines(out: Path) -> list[str]:
    """The candidates of OUT/report.json as a table in text: told apart, sharpness, floors, valid videos, seconds."""
    report = read_results(out / REPORT_FILE)
    lines = [f"{'':34}{'told apart':>31}{'':11}{'distance / floor':>31}{'valid':>8}{'s per':>9}"]
    lines += [f"{'':34}{''.join(f'{title:>{max(9, len(title) + 2)}}' for title in SUMMARY)}{'videos':>8}{'video':>9}"]
    for one in report["contestants"].values():
        figures = ""
        for title, key in SUMMARY.items():
            text = "-" if one[key] is None else f"{one[key]['mean']:.3f}"
            figures += f"{text:>{max(9, len(title) + 2)}}"
        valid = one.get("answers", {}).get("valid")
        share = "-" if valid is None else f"{valid['mean']:.3f}"
        lines.append(f"{one['label']:34}{figures}{share:>8}{one['seconds']:9.3g}")
    if report.get("selection"):
        lines.append(rise_sentence(report["selection"]))
    return lines


def read_results(path: Path) -> Any:  # noqa: ANN401
    """The content of a JSON or safetensors file of this evaluation; ValueError that names it if it cannot be read."""
    try:
        data = read_file(path)
        return load_tensors(data) if path.suffix == ".safetensors" else json.loads(data)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); repeat the command, which writes it again") from error


def report_subject(config: EvaluateConfig) -> dict[str, list[str]]:
    """What the report is about, for its head: checkpoints by run and step, weights, model and data set."""
    folders = [find_student(name, config.model).own_path.resolve() for name in config.checkpoint]
    is_decoded_otherwise = config.videos and config.decoder != FULL_DECODER  # then the pixels depend on it too
    return {
        "run": list(dict.fromkeys(folder.parent.name for folder in folders)),
        "checkpoint": [str(folder) for folder in folders],
        "weights": [config.weights],
        "model": [config.model],
        "data set": [config.shards],
        **({"decoder": [config.decoder]} if is_decoded_otherwise else {}),
    }


def build_report(
    out: Path,
    comparison: Comparison,
    pixels: Mapping[str, Any],
    selection: list[dict[str, Any]] | None,
    subject: dict[str, list[str]],
    device: str = "cpu",
) -> EvaluationReport:
    """Collect the results from the store of latents and from the contents of pixels.json and selection.json."""
    scores = latent_metrics.score_candidates(out / LATENTS_STORE, comparison, device=device)
    teacher_scores = scores[comparison.teacher.name]
    teacher_sets = [latent_set_name(comparison.teacher, seed) for seed in comparison.seeds]
    references = [latent_set_name(comparison.teacher, seed) for seed in comparison.references]
    features = read_results(out / I3D_FILE) if pixels.get("i3d") else {}  # (N D) by set
    contestants: dict[str, dict[str, Any]] = {}
    for candidate in comparison.contestants:
        sets = [latent_set_name(candidate, seed) for seed in comparison.seeds]
        results: dict[str, Any] = {"label": candidate.label, "evaluations": candidate.evaluations}
        results |= latent_summary(scores[candidate.name], teacher_scores)
        if features:  # the Frechet video distance, to the teacher's set of another seed
            pairs = [(features[own], features[other]) for own, other in zip(sets, references, strict=True)]
            results["fvd"] = seed_statistics([latent_metrics.frechet_distance(*pair) for pair in pairs])
        told_apart = [pixels["told_apart"][name] for name in sets] if pixels.get("told_apart") else None
        results["accuracy_pixels"] = latent_metrics.accuracy_statistics(told_apart) if told_apart else None
        if pixels["videos"]:
            own, others = ([pixels["sets"][name] for name in names] for names in (sets, teacher_sets))
            results |= pixel_summary(own, others)
        contestants[candidate.name] = results
    settings = comparison.count, comparison.seeds, comparison.guidance_scale
    floor = seed_statistics(teacher_scores.frechet)
    return EvaluationReport(subject, *settings, pixels["videos"], floor, contestants, selection)


def in_floors(own: Sequence[float], floor: Sequence[float]) -> SeedStatistics:
    """Distances of one candidate, one per seed, over the mean of the teacher's own."""
    divisor = max(sum(floor) / len(floor), SMALLEST_DIVISOR)
    return seed_statistics([distance / divisor for distance in own])


def latent_summary(own: CandidateScores, teacher: CandidateScores) -> dict[str, Metric]:
    """Metrics of one candidate's latents."""
    ratio = None if own.diversity is None else own.diversity / max(teacher.diversity or 0.0, SMALLEST_DIVISOR)
    floors = in_floors(own.frechet, teacher.frechet)
    floors_tanh = in_floors(own.tanh_frechet, teacher.tanh_frechet)
    floors_spectral = in_floors(own.spectral_frechet, teacher.spectral_frechet)
    return {
        "seconds": own.seconds,
        "frechet": seed_statistics(own.frechet),
        # the means of earlier versions, beside which the values of each seed and the intervals stand
        "times_floor": floors.mean,
        "times_floor_tanh": floors_tanh.mean,
        "times_floor_spectral": floors_spectral.mean,
        "floors": floors,
        "floors_tanh": floors_tanh,
        "floors_spectral": floors_spectral,
        "tanh_frechet": seed_statistics(own.tanh_frechet),
        "spectral_frechet": seed_statistics(own.spectral_frechet),
        "accuracy": own.accuracy,
        "accuracy_plain": own.accuracy_plain,
        "sharpness": seed_statistics(own.sharpness),
        "temporal_variance": seed_statistics(own.temporal_variance),
        "latent_contrast": seed_statistics(own.latent_contrast),
        "to_teacher": seed_statistics(own.to_teacher),
        "diversity": own.diversity,
        "diversity_of_teacher": ratio,
    }


def pixel_summary(own: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pixel metrics and answers over the seeds, from the sets' entries in pixels.json; some relate to the teacher's."""
    metrics: dict[str, Any] = {}
    for key in ABSOLUTE_METRICS:
        metrics[key] = None if own[0][key] is None else seed_statistics([one[key] for one in own])
    for key in RATIO_METRICS:
        pairs = zip(own, teacher, strict=True)
        metrics[key] = seed_statistics([one[key] / max(other[key], SMALLEST_DIVISOR) for one, other in pairs])
    answers = [one["answers"] for one in own]  # shares of true answers, by question
    questions = sorted({question for one in answers for question in one})
    # A seed without the question does not count.
    metrics["answers"] = {key: seed_statistics([one[key] for one in answers if key in one]) for key in questions}
    return metrics


def format_metric(value: Metric) -> str:
    """A number, or a mean with its standard deviation, to a few digits; `-` for None."""
    if value is None:
        return "-"
    if not isinstance(value, SeedStatistics):
        return f"{value:.4g}"
    return f"{value.mean:.4g}" + ("" if value.deviation is None else f" ± {value.deviation:.2g}")


def format_interval(value: Metric) -> str:
    """A number, or a mean with its interval, to a few digits; `-` for None."""
    if not isinstance(value, SeedStatistics) or value.low is None:
        return format_metric(value)
    return f"{value.mean:.4g} [{value.low:.3g}, {value.high:.3g}]"


def render_page(report: EvaluationReport, videos: str) -> str:
    """The HTML page; `videos` is the content of its section of videos."""
    deviation = " ± standard deviation" if len(report.seeds) > 1 else ""
    rows = [(name, html.escape(", ".join(texts))) for name, texts in report.subject.items()]
    subject = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    summary = (
        f"<dl>{subject}</dl>"
        f"<p>{report.count} conditions, seeds {', '.join(map(str, report.seeds))}, guidance scale "
        f"{report.guidance_scale:g}. Values are the mean{deviation} over the seeds. "
        "The distance is the Frechet distance of latents, by fixed random features, to the teacher's videos of "
        f"another seed; the floor, {format_metric(report.floor)}, is that between two sets of the teacher itself. "
        f"{LEGEND}</p>"
    )
    if report.count < MIN_CONDITIONS:
        problem = "the distance cannot tell a good sampler from the floor"
        summary += f"<p><b>With fewer than {MIN_CONDITIONS} conditions {problem}.</b></p>"
    candidates = list(report.contestants.values())
    rows = [(one["label"], *(format_metric(one[key]) for key in LATENT_METRICS)) for one in candidates]
    sections = {"Distance to the teacher": summary + html_table(("", *LATENT_TITLES), rows)}
    tables = (measure_table(candidates, columns) for columns in (MEASURES, RATIOS))
    sections["Measures beside the distance"] = f'<p class="soft">{html.escape(MEASURE_NOTE)}</p>' + "".join(tables)
    if report.videos:
        note = f"{report.videos} videos per set. psnr compares frame 0 with the given one as the VAE decodes it."
        sections |= {"Videos": videos, "Pixel metrics": f'<p class="soft">{note}</p>' + pixel_table(candidates)}
    if report.selection:
        sections["Checkpoints"] = selection_table(report.selection)
    body = "".join(f"<section><h2>{heading}</h2>{content}</section>" for heading, content in sections.items())
    return f"{PAGE_START}{body}{SCRIPT}</body></html>\n"


def measure_table(candidates: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of figures with their intervals; `columns` are the titles by key."""
    rows = [(one["label"], *(format_interval(one[key]) for key in columns)) for one in candidates]
    return html_table(("", *columns.values()), rows)


def selection_table(selection: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoints by their mean rank over all measures."""
    rows = [
        (
            one["checkpoint"],
            format_metric(one["rank"]),
            format_interval(seed_statistics(one["values"])),
            *(format_metric(error) for error in one["errors"][1 : len(MAP_NAMES)]),
            *("-" if one[key] is None else f"{one[key]['mean']:.4g}" for key in ("accuracy_plain", "accuracy")),
        )
        for one in selection
    ]
    note = f'<p class="soft">{html.escape(SELECTION_NOTE)}</p>'
    rises = f"<p>{html.escape(rise_sentence(selection))}</p>"
    told_apart = (MEASURES["accuracy_plain"], "whitened")
    head = ("checkpoint", "rank ↓", "distance, convolutions ↓", "tanh ↓", "spectra ↓", *told_apart)
    return note + rises + draw_curve(selection) + html_table(head, rows)


def pixel_table(candidates: Sequence[Mapping[str, Any]]) -> str:
    """The table of pixel metrics, one per row, as a judge may have many questions; without those that none has."""
    rows = []
    for key in ("fvd", *ABSOLUTE_METRICS, *RATIO_METRICS):
        if any(one.get(key) is not None for one in candidates):
            title = f"{key} / teacher's ≈" if key in RATIO_METRICS else f"{key} {DIRECTIONS[key]}"
            rows.append((title, *(format_metric(one.get(key)) for one in candidates)))
    for question in sorted({question for one in candidates for question in one["answers"]}):
        rows.append((f"{question} ↑", *(format_metric(one["answers"].get(question)) for one in candidates)))
    return html_table(("", *(one["label"] for one in candidates)), rows)


def video_section(out: Path, comparison: Comparison, count: int) -> str:
    """The videos of the first `count` conditions side by side, all from the noise of the first seed."""
    sets = {latent_set_name(one, comparison.seeds[0]): html.escape(one.label) for one in comparison.contestants}
    prompts = latent_store.describe_group(out / LATENTS_STORE, next(iter(sets))).prompts
    content = ""
    for row, prompt in enumerate(prompts[:count]):
        content += f'<p>{html.escape(prompt)}</p><div class="row">'
        for name, label in sets.items():
            data = base64.b64encode((out / VIDEOS_FOLDER / name / f"{row:03d}.mp4").read_bytes()).decode()
            video = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline controls></video>'
            content += f"<figure>{video}<figcaption>{label}</figcaption></figure>"
        content += "</div>"
    return content


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows."""
    lines = [
        "".join(  # the titles are shown beside the cells where the screen is narrow
            f'<td data-title="{html.escape(title)}">{html.escape(cell)}</td>'
            for title, cell in zip(head, row, strict=True)
        )
        for row in rows
    ]
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
