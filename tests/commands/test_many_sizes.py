"""A student of several sizes: each picture gets the nearest one, unless a size is given; figures per size."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import av
import pytest
from PIL import Image

from commands.evaluate import evaluate_students
from commands.sample import sample_videos
from common.video import FrameSize, VideoSpec
from shards.dataset import DataSet, open_data_set
from shards.latent_store import describe_group
from stage1_encode.generation.generate import GenerationRequest
from stage2_distill.checkpointing.format import StudentFacts
from stage2_distill.evaluation.compare import list_record_sizes
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.export.model_card import report_lines
from stage2_distill.sampling.config import SampleConfig
from stage2_distill.sampling.student_sampler import choose_sizes
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here
from tests.tiny_models import picture, write_csv


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of square and portrait records with two checkpoints, and pictures of both shapes."""
    folder = tmp_path_factory.mktemp("sizes")
    shards = make_shards(folder / "data", model, records=16, sizes=((64, 64), (96, 64)))
    options = {"iterations": 2, "checkpoint_every": 1, "global_batch": 2, "num_frames": "9,13"}
    run_here(make_config(shards, model, folder / "run", **options))
    for name, size in {"tall": (160, 100), "square": (90, 100)}.items():
        Image.fromarray(picture(*size, seed=3)).save(folder / f"{name}.png")
    return folder


def sample(run: Path, model: Path, **options: object) -> list[Path]:
    changes = {"checkpoint": str(run / "run"), "model": str(model), "dtype": "float32", "device": "cpu"}
    return sample_videos(SampleConfig(**changes | options))


def frame_size(path: Path) -> tuple[int, int]:
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        return frame.height, frame.width


def test_a_picture_gets_the_nearest_size_in_one_line(
    run: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = {"prompt": "a", "image": str(run / "tall.png")}
    (video,) = sample(run, model, out=str(tmp_path / "tall.mp4"), **options)
    assert frame_size(video) == (96, 64)
    assert describe_group(tmp_path / "tall.zarr", "sample").spec.height == 96
    line = "sample: 96x64 (height x width), nearest to the picture's 160x100; the student also knows 64x64"
    assert caplog.messages.count(line) == 1
    (video,) = sample(run, model, out=str(tmp_path / "given.mp4"), height=64, num_frames=9, **options)
    assert frame_size(video) == (64, 64)
    (video,) = sample(run, model, out=str(tmp_path / "text.mp4"), prompt="a")
    assert frame_size(video) == (64, 64)  # that of the run's options


def test_rows_of_a_csv_have_their_own_sizes(run: Path, model: Path, tmp_path: Path) -> None:
    rows = [("a", "square.png", 1), ("b", "tall.png", 2), ("c", "", 3), ("d", "tall.png", 4)]
    table = write_csv(run / "p.csv", rows, ("prompt", "image", "seed"))
    files = sample(run, model, out=str(tmp_path / "out"), data=str(table), batch_size=2)
    names = [
        "000000000.mp4",
        "000000002.mp4",
        "contact-64x64.png",
        "000000001.mp4",
        "000000003.mp4",
        "contact-96x64.png",
    ]
    assert [path.name for path in files] == names and all(path.is_file() for path in files)
    assert [frame_size(files[index]) for index in (0, 1, 3, 4)] == [(64, 64)] * 2 + [(96, 64)] * 2
    assert describe_group(tmp_path / "out" / "latents-96x64.zarr", "sample").keys == ("000000001", "000000003")
    again = sample(run, model, out=str(tmp_path / "out"), data=str(table), height=96)  # its own files are no obstacle
    assert again[-1].name == "contact.png" and {frame_size(path) for path in again[:-1]} == {(96, 64)}


def test_each_size_has_its_own_predicted_time(
    run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[int, float | None]]()

    def generate(request: GenerationRequest, *_: object, **__: object) -> list[Path]:
        seen.append((request.spec.height, request.denoising_seconds))
        return []

    for module in ("commands.sample", "stage2_distill.sampling.student_sampler"):  # on a CPU nothing is predicted
        monkeypatch.setattr(f"{module}.predict_seconds", lambda _, spec: spec.height / 8)
    monkeypatch.setattr("commands.sample.generate_videos", generate)
    table = write_csv(run / "t.csv", [("a", "square.png", 1), ("b", "tall.png", 2)], ("prompt", "image", "seed"))
    sample(run, model, out=str(tmp_path / "out"), data=str(table))
    assert seen == [(64, 8.0), (96, 12.0)]


def evaluate(run: Path, model: Path, out: Path, **changes: object) -> dict:
    options = {"num_records": 4, "seeds": (0,), "teacher_steps": 2, "videos": 2, "report_videos": 1, "batch_size": 4}
    options |= {"dtype": "float32", "device": "cpu", "guidance_scale": 1.0}
    config = EvaluateConfig((str(run / "run"),), str(run / "data"), str(model), str(out), **options | changes)
    page = evaluate_students(config)
    assert page == out / "report.html" and page.is_file()
    return json.loads((out / "report.json").read_text())


def test_every_size_has_its_figures_and_one_checkpoint_is_chosen_on_all(run: Path, model: Path, tmp_path: Path) -> None:
    report = evaluate(run, model, tmp_path / "all", num_frames=9, select=True)
    sizes = report["sizes"]
    assert list(sizes) == ["64x64", "96x64"] and [one["count"] for one in sizes.values()] == [4, 4]
    page = (tmp_path / "all" / "report.html").read_text()
    assert 'href="96x64/report.html"' in page and 'data-title="64x64"' in page
    rows = list(zip(*(one["selection"] for one in sizes.values()), strict=True))
    assert [[one["checkpoint"] for one in row] for row in rows] == [["step-000001"] * 2, ["step-000002"] * 2]
    means = [(fmean(one["rank"] for one in row), fmean(one["mean"] for one in row), row[0]) for row in rows]
    rank, distance, first = min(means, key=lambda mean: mean[:2])
    best = json.loads((run / "run" / "best").read_text())
    assert best["checkpoint"] == first["checkpoint"] and best["distance"] == pytest.approx(distance)
    assert "<h2>Checkpoints</h2>" in page and f'data-title="rank \u2193">{rank:.4g}<' in page
    alone = evaluate(run, model, tmp_path / "one", num_frames=9, size="96x64")
    for name, figures in alone["contestants"].items():
        other = sizes["96x64"]["contestants"][name]
        assert {key: value for key, value in figures.items() if key != "seconds"} == {
            key: value for key, value in other.items() if key != "seconds"
        }
    assert describe_group(tmp_path / "one" / "latents.zarr", "teacher-seed-0").spec.num_frames == 9
    assert (tmp_path / "one" / "videos").is_dir()
    card = "\n".join(report_lines(tmp_path / "all"))
    assert "4 conditions of 64x64, seeds 0." in card and "4 conditions of 96x64, seeds 0." in card


def test_a_size_with_too_few_records_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvaluateConfig((str(run / "run"),), str(run / "data"), "model", "out")
    assert list(map(str, list_record_sizes(config))) == ["64x64", "96x64"] and not caplog.messages
    groups = open_data_set(run / "data").size_groups
    few = replace(groups[1], ranges=(range(8, 9),))
    monkeypatch.setattr(DataSet, "size_groups", (groups[0], few))
    assert list(map(str, list_record_sizes(config))) == ["64x64"]
    assert caplog.messages == ["evaluate: 96x64 is left out, as it has too few records: 1"]


def test_height_alone_chooses_among_the_trained_sizes(caplog: pytest.LogCaptureFixture) -> None:
    wide, tall, square = FrameSize(704, 1280), FrameSize(1280, 704), FrameSize(960, 960)
    facts = StudentFacts(
        1, (1000.0,), 5.0, "renoise", VideoSpec(), "", "", "", "", {}, sizes=(wide, square, tall), lengths=(81, 121)
    )  # fmt: skip

    def choose(**options: int) -> tuple[str, int, list[str]]:
        spec, sizes = choose_sizes(SampleConfig("run", "model", "out.mp4", prompt="a", **options), facts)
        return str(spec.frame_size), spec.num_frames, list(map(str, sizes))

    assert choose() == ("704x1280", 121, ["704x1280", "960x960", "1280x704"])
    assert choose(height=1280) == choose(width=704) == ("1280x704", 121, [])
    assert choose(height=960, num_frames=81) == ("960x960", 81, []) and not caplog.messages
    assert choose(height=640) == ("640x1280", 121, [])
    assert "640x1280 is none of the sizes that the student was trained on: 704x1280, 960x960" in caplog.text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": "64x96"}, "size=64x96: the records of .* have 64x64, 96x64; give one of them"),
        ({"size": "64"}, "size=64: must be HEIGHTxWIDTH"),
        (
            {"size": "64x64", "num_frames": 17},
            "was trained on 9, 13 frames of 64x64, 96x64 at 8 per second, and the rec",
        ),
    ],
)
def test_sizes_and_lengths_that_do_not_fit_are_refused(
    run: Path, model: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        evaluate(run, model, tmp_path / "out", **changes)
