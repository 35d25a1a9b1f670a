"""Writes report.json and report.html of several sizes: the figures of each beside those of the others."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from common.files import staged_output, write_file
from common.options import write_config
from common.video import FrameSize
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.report import (
    EVALUATION_CONFIG_FILE,
    PAGE_FILE,
    PAGE_START,
    REPORT_FILE,
    html_table,
    read_results,
)

FIGURES = {"times_floor": "times the floor \u2193", "diversity_of_teacher": "diversity / teacher's \u2248"}

SELECTION_NOTE = (
    "A checkpoint's rank is the mean of its ranks on each size, which count the same, however many records they have. "
    "The one with the smallest is compared; of equal ones that with the smaller mean distance. How a size ranks them "
    "is on its own page."
)


def checkpoint_section(selections: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The ranks of a run's checkpoints on each size, {size: content of its selection.json}, and their mean."""
    rows = []
    for ranks in zip(*selections.values(), strict=True):
        values = [one["rank"] for one in ranks]
        rows.append((ranks[0]["checkpoint"], *(f"{value:.4g}" for value in (fmean(values), *values))))
    table = html_table(("checkpoint", "rank \u2193", *selections), rows)
    return f'<section><h2>Checkpoints</h2><p class="soft">{SELECTION_NOTE}</p>{table}</section>'


def write_size_report(config: EvaluateConfig, pages: Mapping[FrameSize, Path]) -> None:
    """Write OUT/report.json, OUT/report.html and OUT/evaluate.yaml from the reports of each size; `pages` name them."""
    reports = {str(size): read_results(page.with_suffix(".json")) for size, page in pages.items()}
    out, links = Path(config.out), (f'<a href="{size}/{PAGE_FILE}">{size}</a>' for size in reports)
    counts = (f"{size}: {report['count']}" for size, report in reports.items())
    body = (
        f"<p>Conditions of each size (height x width): {html.escape(', '.join(counts))}. Pages: {', '.join(links)}.</p>"
    )
    if config.select:
        body += checkpoint_section({size: report["selection"] for size, report in reports.items()})
    names = list(next(iter(reports.values()))["contestants"])
    for key, title in FIGURES.items():
        rows = []
        for name in names:
            found = [report["contestants"][name] for report in reports.values()]
            rows.append((found[0]["label"], *(f"{one[key]:.4g}" if one.get(key) is not None else "-" for one in found)))
        body += f"<section><h2>{title}</h2>{html_table(('', *reports), rows)}</section>"
    with staged_output(out) as staging:
        write_config(staging / EVALUATION_CONFIG_FILE, config)
        text = json.dumps({"sizes": reports}, indent=1, ensure_ascii=False)
        write_file(staging / REPORT_FILE, (text + "\n").encode())
        write_file(staging / PAGE_FILE, f"{PAGE_START}{body}</body></html>\n".encode())
