"""Writes report.json and report.html of several sizes: the figures of each beside those of the others."""

import html
import json
from collections.abc import Mapping
from pathlib import Path

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


def write_size_report(config: EvaluateConfig, pages: Mapping[FrameSize, Path]) -> None:
    """Write OUT/report.json, OUT/report.html and OUT/evaluate.yaml from the reports of each size; `pages` name them."""
    reports = {str(size): read_results(page.with_suffix(".json")) for size, page in pages.items()}
    out, links = Path(config.out), (f'<a href="{size}/{PAGE_FILE}">{size}</a>' for size in reports)
    counts = (f"{size}: {report['count']}" for size, report in reports.items())
    body = (
        f"<p>Conditions of each size (height x width): {html.escape(', '.join(counts))}. Pages: {', '.join(links)}.</p>"
    )
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
