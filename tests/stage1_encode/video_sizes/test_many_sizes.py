"""`encode --sizes`: a mixed corpus by one command, equal bytes over kill and resume, and what changes are refused."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from PIL import Image

from shards.dataset import open_data_set
from shards.manifest import read_manifest
from shards.verification.verify import verify_data_set
from stage1_encode.config import EncodeConfig, VerifyConfig
from stage1_encode.encode import TooManyFailuresError, encode
from stage1_encode.media.first_frame import read_displayed_shape, read_first_frame
from stage1_encode.repair import draw_contact_sheet, repair_data_set
from tests.forked import run_python
from tests.stage1_encode.corpus import QUARTERS
from tests.stage1_encode.test_encode import configure, failures, hashes, records
from tests.stage1_encode.video_sizes.mixed_corpus import SHAPES, SIZES, SQUARE, TALL, WIDE, Shape, make_corpus
from tests.tiny_models import make_clip, write_csv

ROOT = Path(__file__).parents[3]


def configure_sizes(data: Path, model: Path, out: Path, **options: object) -> EncodeConfig:
    return configure(data, model, out, **({"sizes": SIZES, "shard_size": 2} | options))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of nine clips, three of each size."""
    folder = tmp_path_factory.mktemp("few")
    sizes = [WIDE, TALL, SQUARE] * 3
    for number, (height, width) in enumerate(sizes):
        make_clip(folder / f"{number}.mp4", seed=number, frames=2, height=height, width=width)
    return write_csv(folder / "few.csv", [(f"{number}.mp4", f"a {number}") for number in range(9)])


@pytest.fixture(scope="module")
def few_set(tmp_path_factory: pytest.TempPathFactory, few: Path, model: Path) -> Path:
    """Their data set of an uninterrupted run."""
    out = tmp_path_factory.mktemp("few set") / "set"
    encode(configure_sizes(few, model, out))
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, Shape]]]:
    """The CSV of a mixed corpus, and its files."""
    folder = tmp_path_factory.mktemp("mixed") / "files"
    files = make_corpus(folder)
    return write_csv(folder / "mixed.csv", [(name, f"a {name}") for name, _ in files]), files


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_file_is_displayed_upright_in_its_shape(mixed: tuple[Path, list[tuple[str, Shape]]], shape: Shape) -> None:
    path = mixed[0].parent / f"{shape.name}-0{shape.suffix}"
    assert read_displayed_shape(str(path)) == shape.displayed
    frame = read_first_frame(str(path), height=shape.size[0], width=shape.size[1])
    assert frame.shape == shape.displayed
    for (y, x), colour in QUARTERS.items():  # right way up
        pixel = frame.pixels[round(y * shape.size[0]), round(x * shape.size[1])]
        assert numpy.abs(pixel.astype(int) - colour).max() < 24, (y, x, pixel)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_shape_of_a_picture_is_that_of_its_first_frame(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert read_displayed_shape(str(path)) == read_first_frame(str(path), height=32, width=32).shape
    assert read_displayed_shape(str(path)) == ((40, 60) if orientation < 5 else (60, 40))


def test_a_mixed_corpus_goes_in_by_one_command(
    mixed: tuple[Path, list[tuple[str, Shape]]], model: Path, tmp_path: Path
) -> None:
    table, files = mixed
    assert len(files) >= 60
    report = encode(configure_sizes(table, model, tmp_path / "set", shard_size=16, max_failure_rate=0.1))
    assert (report.records, report.failures) == (len(files) - 4, 4)
    by_key = {f"{row:09d}": file for row, file in enumerate(files)}
    stored = records(tmp_path / "set")
    for record in stored:
        name, shape = by_key[record.key]
        assert record.source.path == name and not shape.is_tiny
        assert record.first_frame.shape[2:] == (shape.size[0] // 16, shape.size[1] // 16)
        _, _, height, width = record.source.crop
        aspect = shape.displayed[1] / shape.displayed[0] / (record.source.size[1] / record.source.size[0])
        assert width * aspect / height == pytest.approx(shape.size[1] / shape.size[0], rel=0.02)
        assert height == pytest.approx(record.source.size[0]) or width == pytest.approx(record.source.size[1])
    assert {row["reason"] for row in failures(tmp_path / "set")} == {"is 24x36, too small for 64x96 (height x width)"}
    verified = verify_data_set(tmp_path / "set")
    assert verified.problems == ()
    counts = {size: sum(shape.count for shape in SHAPES if shape.size == size) for size in (SQUARE, WIDE, TALL)}
    counts[WIDE] -= 4
    assert {(size.height, size.width): count for size, count in verified.size_counts.items()} == counts
    assert f"{counts[TALL]} records of 96x64 (height x width)" in verified.format_lines()
    assert {note.note: note.records for note in report.notes}["size 96x64"] == counts[TALL]
    tiny = write_csv(table.with_name("tiny.csv"), [(name, "a") for name, shape in files if shape.is_tiny])
    kept = encode(configure_sizes(tiny, model, tmp_path / "kept", max_upscale=0.0))
    assert (kept.records, kept.failures) == (4, 0)


def test_kills_change_no_byte(few: Path, few_set: Path, model: Path, tmp_path: Path) -> None:
    completed = run_python("tests/stage1_encode/kill_worker.py", model, few, tmp_path / "out", 3, 1, SIZES)
    assert completed.returncode == 0, completed.stderr[-2000:]
    resumed = {name: digest for name, digest in hashes(tmp_path / "out").items() if not name.endswith(".partial")}
    assert resumed == hashes(few_set)
    assert read_manifest(tmp_path / "out").schema == 2 and len(open_data_set(tmp_path / "out").size_groups) == 3


def test_ranks_and_jobs_share_the_survey(
    few: Path, few_set: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = encode(configure_sizes(few, model, out, shard_range="1:3"))
    assert (first.shards, first.is_complete) == (2, False) and (out / "survey.csv").is_file()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        report = encode(configure_sizes(few, model, out))
    assert report.is_complete and hashes(out) == hashes(few_set)


def test_a_finished_set_of_sizes_is_left_alone_and_repaired(
    few: Path, few_set: Path, model: Path, tmp_path: Path
) -> None:
    expected, copy = hashes(few_set), shutil.copytree(few_set, tmp_path / "set")
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir() if path.name != "encode.lock"}
    encode(configure_sizes(few, model, copy))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for name in ("shard-000001.tar", "plan.json"):
        (copy / name).write_bytes(b"x")
    report = verify_data_set(copy)
    assert {problem.file for problem in report.problems} == {"shard-000001.tar", "plan.json"}
    repair_data_set(report, VerifyConfig(repair=True, model=str(model), device="cpu"))
    assert hashes(copy) == expected and verify_data_set(copy).problems == ()


def test_a_contact_sheet_shows_each_picture_in_its_shape(few_set: Path, model: Path, tmp_path: Path) -> None:
    sheet = draw_contact_sheet(
        verify_data_set(few_set), VerifyConfig(model=str(model), sheet=str(tmp_path / "a.png"), device="cpu")
    )
    pixels = numpy.asarray(Image.open(sheet))
    assert pixels.shape == (2 * (240 + 14), 8 * 240, 3)
    corners = [(row, column) for row in (0, 254) for column in range(0, 1920, 240)]
    shown = [(pixels[row : row + 240, column : column + 240] < 250).all(-1) for row, column in corners]
    extents = [(int(cell.any(1).sum()), int(cell.any(0).sum())) for cell in shown[:9]]
    for (height, width), expected in zip(extents, [(240, 240)] * 3 + [(160, 240)] * 3 + [(240, 160)] * 3, strict=True):
        assert abs(height - expected[0]) <= 14 and abs(width - expected[1]) <= 3


def test_added_rows_keep_the_shards_and_the_survey(few: Path, few_set: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(few.parent, tmp_path / "files")
    copy, table = shutil.copytree(few_set, tmp_path / "set"), tmp_path / "files" / few.name
    before = (copy / "survey.csv").read_text()
    with table.open("a", newline="") as file:
        csv.writer(file).writerow(("1.mp4", "again"))
    encode(configure_sizes(table, model, copy))
    assert (copy / "survey.csv").read_text() == f"{before}9,1.mp4,96,64,\n"
    changed = {name for name, digest in hashes(few_set).items() if hashes(copy)[name] != digest}
    assert changed == {"manifest.json", "survey.csv", "shard-000004.json", "shard-000004.tar"}
    table.write_text(table.read_text().replace("2.mp4", "0.mp4"))
    with pytest.raises(ValueError, match=r"line 4 names 0.mp4, and .* was begun with 2.mp4 there; rows may only"):
        encode(configure_sizes(table, model, copy))


def test_files_that_cannot_be_read_stop_the_survey_and_are_tried_again(
    few: Path, few_set: Path, model: Path, tmp_path: Path
) -> None:
    folder, out = shutil.copytree(few.parent, tmp_path / "files"), tmp_path / "set"
    (folder / "4.mp4").rename(folder / "away")
    config = configure_sizes(folder / few.name, model, out)
    with pytest.raises(TooManyFailuresError, match="1 of 9 files cannot be read, .*: 1 x does not exist; correct"):
        encode(config)
    assert sorted(path.name for path in out.iterdir()) == ["encode.lock", "survey-progress.csv"]
    with (out / "survey-progress.csv").open("a") as file:
        file.write("8,to")  # of a run that was killed while it wrote
    (folder / "away").rename(folder / "4.mp4")
    encode(config)
    assert hashes(out) == hashes(few_set)


def test_a_file_that_appears_later_gets_no_wrong_size(few: Path, model: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(few.parent, tmp_path / "files"), tmp_path / "set"
    for name in ("3.mp4", "4.mp4"):  # one that belongs to the first size of the list, one that does not
        (folder / name).rename(folder / f"{name} away")
    config = configure_sizes(folder / few.name, model, out, max_failure_rate=0.5)
    assert encode(replace(config, sizes="64x96,96x64")).failures == 2
    for name in ("3.mp4", "4.mp4"):
        (folder / f"{name} away").rename(folder / name)
    encode(replace(config, sizes="64x96,96x64", retry_failures=True))
    (left,) = failures(out)
    assert left["path"] == "4.mp4" and left["reason"].startswith("belongs to size 96x64, and could not be read, or had")
    assert verify_data_set(out).problems == ()


def test_other_sizes_need_another_folder(few: Path, few_set: Path, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(few_set, tmp_path / "set")
    assert not encode(configure_sizes(few, model, copy, sizes="96x64,64x64,64x96")).failures  # the order says nothing
    with pytest.raises(ValueError, match="sizes: '64x64,64x96,96x64', expected '64x96,96x64'"):
        encode(configure_sizes(few, model, copy, sizes="64x96,96x64"))
    with pytest.raises(ValueError, match="begun with other settings: max_upscale: 2.0, expected 3.0"):
        encode(configure_sizes(few, model, copy, max_upscale=3.0))
    with pytest.raises(ValueError, match="begun with other settings: schema: 2, expected 1; sizes: "):
        encode(configure(few, model, copy, shard_size=2))
    for line in ("0,0.mp4,,,", "0,0.mp4,0,9,", "0,0.mp4,9,-9,"):
        (copy / "survey.csv").write_text(f"row,path,height,width,problem\n{line}\n")
        with pytest.raises(ValueError, match="survey.csv: line 2 is damaged .neither a size nor a problem.; delete"):
            encode(configure_sizes(few, model, copy))
    (copy / "survey.csv").unlink()
    encode(configure_sizes(few, model, copy))
    assert hashes(copy) == hashes(few_set)


def test_one_size_of_the_option_is_a_data_set_of_schema_1(few: Path, model: Path, tmp_path: Path) -> None:
    encode(configure_sizes(few, model, tmp_path / "set", sizes="64x64"))
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.schema, manifest.spec.height, manifest.spec.width, manifest.records) == (1, 64, 64, 9)
    assert verify_data_set(tmp_path / "set").problems == ()
