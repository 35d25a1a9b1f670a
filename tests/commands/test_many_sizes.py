"""A student of several sizes: each picture gets the nearest one, unless a size is given; figures per size."""

import json
import logging
from pathlib import Path

import av
import pytest
from PIL import Image

from commands.evaluate import evaluate_students
from commands.sample import sample_videos
from shards.latent_store import describe_group
from stage2_distill.evaluation.config import EvaluateConfig
from stage2_distill.sampling.config import SampleConfig
from tests.stage2_distill.training_helpers import make_config, make_shards, run_here
from tests.tiny_models import picture, write_csv


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of square and portrait records, and pictures of both shapes."""
    folder = tmp_path_factory.mktemp("sizes")
    shards = make_shards(folder / "data", model, records=16, sizes=((64, 64), (96, 64)))
    run_here(make_config(shards, model, folder / "run", iterations=1, global_batch=2, num_frames="9,13"))
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
    (video,) = sample(run, model, out=str(tmp_path / "given.mp4"), height=64, width=64, **options)
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


def evaluate(run: Path, model: Path, out: Path, **changes: object) -> dict:
    options = {"num_records": 4, "seeds": (0,), "teacher_steps": 2, "videos": 2, "report_videos": 1, "batch_size": 4}
    options |= {"dtype": "float32", "device": "cpu", "guidance_scale": 1.0}
    config = EvaluateConfig((str(run / "run"),), str(run / "data"), str(model), str(out), **options | changes)
    page = evaluate_students(config)
    assert page == out / "report.html" and page.is_file()
    return json.loads((out / "report.json").read_text())


def test_every_size_has_its_figures(run: Path, model: Path, tmp_path: Path) -> None:
    sizes = evaluate(run, model, tmp_path / "all", num_frames=9)["sizes"]
    assert list(sizes) == ["64x64", "96x64"] and [report["count"] for report in sizes.values()] == [4, 4]
    page = (tmp_path / "all" / "report.html").read_text()
    assert 'href="96x64/report.html"' in page and 'data-title="64x64"' in page
    alone = evaluate(run, model, tmp_path / "one", num_frames=9, size="96x64")
    for name, figures in alone["contestants"].items():
        other = sizes["96x64"]["contestants"][name]
        assert {key: value for key, value in figures.items() if key != "seconds"} == {
            key: value for key, value in other.items() if key != "seconds"
        }
    assert describe_group(tmp_path / "one" / "latents.zarr", "teacher-seed-0").spec.num_frames == 9
    assert (tmp_path / "one" / "videos").is_dir()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"select": True}, r"select=True: the records have several sizes \(64x64, 96x64\); choose by one"),
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
