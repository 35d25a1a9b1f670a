"""The command `evaluate` from end to end: its files, its metrics, and its page in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from commands.evaluate import evaluate_students
from stage1_encode.media.video_writer import write_video
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.evaluation.report import html_table, report_subject, selection_table, summary_lines, write_report
from tests.stage2_distill import training_helpers

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
)
PROBE = """<script>const bad=[];addEventListener('error',e=>bad.push(e.message||'resource'),true);
console.error=m=>bad.push(m);setTimeout(()=>{document.title=JSON.stringify({bad,wide:
document.documentElement.scrollWidth>innerWidth,cut:[...document.querySelectorAll('*')].filter(
e=>e.scrollWidth>e.clientWidth+1&&e.clientWidth&&getComputedStyle(e).overflowX!='visible').map(e=>e.tagName),videos:[...document.querySelectorAll('video')].map(
v=>[v.videoWidth,v.videoHeight,v.currentTime>0,v.error===null])})},1500)</script>"""
JUDGE = "def judge(video, prompt):\n    return {'right': [True, False], 'even': prompt[-1] in '02468'}\n"


def tell_pixels_apart(one: Tensor, other: Tensor, seed: int) -> tuple[float, float, float]:
    """Stands for the two-sample test: the share of values that differ, with an interval."""
    assert one.shape == other.shape == (3, 3, 9, 64, 64) and one.dtype == torch.uint8
    share = float((one != other).float().mean())
    return share, share - 0.25, share + 0.25


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    training_helpers.make_shards(folder / "data", model)
    training_helpers.run_here(training_helpers.make_config(folder / "data", model, folder / "run", iterations=3))
    (folder / "judge.py").write_text(JUDGE)
    config = EvaluateConfig(
        (str(folder / "run"),), str(folder / "data"), str(model), str(folder / "out"), num_records=6, seeds=(0, 1),
        teacher_steps=4, videos=3, report_videos=2, judge=str(folder / "judge.py"), batch_size=2, dtype="float32",
        device="cpu", controls=True, true_clips=str(folder),
    )  # fmt: skip
    for number in range(6):
        frames = numpy.full((9, 64, 64, 3), 30 * number, dtype=numpy.uint8)
        write_video(folder / f"{number}.mp4", frames, fps=training_helpers.SPEC.fps)
    with pytest.MonkeyPatch.context() as patch:  # so few videos have no test
        patch.setattr("commands.evaluate.pixel_test_of", lambda *_: tell_pixels_apart)
        patch.setattr("stage1_encode.video_metrics.true_clips.LARGEST_DIFFERENCE", float("inf"))  # random first frames
        page = evaluate_students(config)
    assert page == folder / "out" / "report.html"
    return folder / "out"


def test_report_holds_the_metrics(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert (report["count"], report["seeds"], report["videos"]) == (6, [0, 1], 3)
    rows = report["contestants"]
    assert set(rows) == {"teacher", "teacher-few", "undistilled", "teacher-unguided", "student", "true"}
    assert [rows[name]["evaluations"] for name in ("teacher", "teacher-unguided", "true")] == [8, 4, 0]
    assert rows["true"]["diversity"] == 0, "one clip per condition"
    assert rows["teacher"]["frechet"] == report["floor"]
    assert rows["teacher"]["motion"]["values"] == [1, 1]
    assert rows["student"]["motion"]["mean"] != 1
    assert rows["student"]["psnr"]["mean"] == 100, "frame 0 is the given first frame"
    assert rows["student"]["answers"]["right"]["mean"] == 0.5
    assert rows["student"]["answers"]["even"]["mean"] == pytest.approx(2 / 3)  # prompts 0, 1, 2
    assert rows["student"]["seconds"] > 0
    assert rows["teacher"]["sharpness"]["values"] == [1, 1]
    assert rows["student"]["sharpness"]["mean"] != 1
    assert (rows["teacher"]["times_floor_tanh"], rows["teacher"]["times_floor_spectral"]) == (1, 1)
    assert rows["student"]["accuracy"] is None, "too few conditions for a classifier"
    pixels = rows["student"]["accuracy_pixels"]
    assert 0 < pixels["mean"] < 1 and len(pixels["values"]) == 2
    assert pixels["low"] < pixels["mean"] - 0.2, "one pass of each seed has 0.25"
    assert rows["student"]["floors"]["mean"] == pytest.approx(rows["student"]["times_floor"])
    assert rows["student"]["floors_tanh"]["low"] < rows["student"]["times_floor_tanh"]
    expected = rows["student"]["frechet"]["mean"] / report["floor"]["mean"]
    assert rows["student"]["times_floor"] == pytest.approx(expected)


def test_summary_has_a_line_per_candidate(out: Path, tmp_path: Path) -> None:
    rows = json.loads((out / "report.json").read_text())["contestants"]
    _, head, *lines = summary_lines(out)
    assert head.split()[-3:] == ["convolutions", "videos", "video"]
    assert [line[:34].rstrip() for line in lines] == [one["label"] for one in rows.values()]
    assert [line.split()[-2] for line in lines] == ["-"] * 6, "this judge has no question `valid`"
    rows["student"]["answers"]["valid"] = {"mean": 0.25}
    (tmp_path / "report.json").write_text(json.dumps({"contestants": rows}))
    assert summary_lines(tmp_path)[-2].split()[-2] == "0.250"
    assert float(lines[-2].split()[-3]) == pytest.approx(rows["student"]["times_floor"], abs=0.0005)
    selection = [{"checkpoint": "a", "errors": [4, 2, 1]}, {"checkpoint": "b", "errors": [5, 1, 1]}]
    (tmp_path / "report.json").write_text(json.dumps({"contestants": rows, "selection": selection}))
    assert summary_lines(tmp_path)[-1].endswith("to the next: convolutions 25%, tanh 0%, spectra 0%.")


def test_table_of_checkpoints_shows_the_test_that_ranks_and_the_whitened_one() -> None:
    plain, whitened = {"mean": 0.625}, {"mean": 0.9995}
    row = {"checkpoint": "step-000001", "rank": 1.5, "values": [0.25], "errors": [0.25, 0.5, 0.75]}
    rows = [row | {"accuracy_plain": plain, "accuracy": whitened}, row | {"accuracy_plain": None, "accuracy": None}]
    page = selection_table(rows)
    assert re.findall(r'"told apart, latents ↓">(.*?)<', page) == ["0.625", "-"]
    assert re.findall(r'"whitened">(.*?)<', page) == ["0.9995", "-"]
    assert "the whitened one, which is near 1 for every student of few steps, is shown as information" in page


def test_page_is_self_contained(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count("<video") == 2 * 6
    assert "prefers-color-scheme:dark" in page


def test_page_names_its_subject_and_the_directions(out: Path, model: Path) -> None:
    page, report = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    subject = {
        "run": ["run"],
        "checkpoint": [str(out.parent / "run" / "step-000003")],
        "weights": ["ema"],
        "model": [str(model)],
        "data set": [str(out.parent / "data")],
    }
    assert report["subject"] == subject
    for name, texts in subject.items():
        assert f"<dt>{name}</dt><dd>{texts[0]}</dd>" in page
    assert "↓ lower is better, ↑ higher is better, ≈ best where" in page
    for title in ("distance ↓", "diversity ≈", "s per video ↓"):
        assert f"<th>{title}</th>" in page
        assert f'<td data-title="{title}">' in page, "beside the cell on narrow screens"
    assert "it prefers blurred students" in page
    for title in ("floors, tanh ↓", "told apart, pixels ↓", "sharpness ≈"):
        assert f"<th>{title}</th>" in page
    for title in ("psnr ↑", "motion / teacher&#x27;s ≈", "right ↑"):
        assert f'<td data-title="">{title}</td><td data-title="teacher, 4 guided steps">' in page


@pytest.mark.parametrize("name", ["pixels.json", "contest.json", "selection.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"videos": ', b"\xff"])
def test_an_input_that_cannot_be_read_is_named(name: str, content: bytes | None, out: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(out, tmp_path / "out")
    (copied / name).unlink(missing_ok=True)
    if content is not None:
        (copied / name).write_bytes(content)
    run = str(out.parent / "run")
    with pytest.raises(ValueError, match=f"^{copied / name}: "):
        write_report(EvaluateConfig((run,), "data", "model", str(copied), videos=3, select=True))
    assert (copied / "report.html").read_bytes() == (out / "report.html").read_bytes()


def test_the_subject_names_a_decoder_only_if_videos_are_decoded(out: Path, model: Path) -> None:
    config = EvaluateConfig((str(out.parent / "run"),), "data", str(model), "out", decoder="tiny.pth", videos=3)
    assert report_subject(config)["decoder"] == ["tiny.pth"]
    for other in (replace(config, videos=0), replace(config, decoder="full")):
        assert "decoder" not in report_subject(other)


def test_table_escapes_text() -> None:
    assert "&lt;b&gt;" in html_table(("", "x"), [("<b>", "1")])


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_plays_every_video(out: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probe.html"
    probed.write_text((out / "report.html").read_text().replace("</head>", PROBE + "</head>"))
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'user'}", f"--window-size={width},1200"]
    for _ in range(3):  # the browser's virtual time does not wait for its decoders, which a busy machine delays
        result = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=60)
        title = re.search(r"<title>({.*})</title>", result.stdout)
        assert title, result.stderr[-500:]
        probe = json.loads(title[1].replace("&gt;", ">"))
        if all(is_playing for _, _, is_playing, _ in probe["videos"]):
            break
    assert probe["bad"] == []
    assert not probe["wide"], "the page must not scroll sideways"
    assert probe["cut"] == [], "nothing is wider than its box"
    assert probe["videos"] == [[64, 64, True, True]] * 12
