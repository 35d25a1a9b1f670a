"""`verify --repair` encodes only what is broken; the contact sheet shows the records."""

import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image

from shards.dataset import open_data_set
from shards.verification.verify import verify_data_set
from stage1_encode.config import VerifyConfig
from stage1_encode.encode import encode
from stage1_encode.repair import (
    CELL_WIDTH,
    LABEL_HEIGHT,
    PICTURES_PER_ROW,
    draw_contact_sheet,
    original_config,
    repair_data_set,
)
from tests import tiny_models
from tests.stage1_encode.test_encode import configure, hashes

CPU = VerifyConfig(device="cpu")


@pytest.fixture(scope="module")
def complete_set(tmp_path_factory: pytest.TempPathFactory, clips: Path, model: Path) -> Path:
    """Three shards of two rows, one of which failed."""
    rows = [(clips / f"clip-{i}.mp4", f"prompt {i}") for i in range(5)]
    folder = tmp_path_factory.mktemp("repair")
    table = tiny_models.write_csv(folder / "rows.csv", [*rows, (folder / "gone.mp4", "lost")])
    encode(configure(table, model, folder / "set", shard_size=2, max_failure_rate=0.5))
    return folder / "set"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "rewritten"),
    [
        ("shard-000001.tar", {"shard-000001.tar", "shard-000001.json"}),
        ("shard-000002.json", {"shard-000002.tar", "shard-000002.json"}),
        ("negative.safetensors", set()),
        ("manifest.json", set()),
        ("failures.csv", set()),
    ],
)
def test_only_what_is_broken_is_made_again(name: str, rewritten: set[str], complete_set: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    flip(folder / name, (folder / name).stat().st_size // 2)
    report = verify_data_set(folder)
    assert {problem.file for problem in report.problems} == {name}
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    repair_data_set(report, CPU)
    assert hashes(folder) == hashes(complete_set) and verify_data_set(folder).problems == ()
    assert {path for path in before if (folder / path).stat().st_mtime_ns != before[path]} == rewritten


def test_a_repair_computes_in_the_batches_of_the_command(clips: Path, model: Path, tmp_path: Path) -> None:
    config = configure(clips / "clips.csv", model, tmp_path / "set", batch_size=3, text_batch_tokens=50)
    encode(config)
    options = original_config(tmp_path / "set", CPU)
    assert (options.batch_size, options.text_batch_tokens) == (3, 50)
    before = hashes(tmp_path / "set")
    flip(tmp_path / "set" / "shard-000001.tar", 3000)
    repair_data_set(verify_data_set(tmp_path / "set"), CPU)
    assert hashes(tmp_path / "set") == before


def test_nothing_is_deleted_where_the_command_cannot_run(complete_set: Path, clips: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    flip(folder / "shard-000001.tar", 3000)
    report, before = verify_data_set(folder), hashes(folder)
    with pytest.raises(ValueError, match="no such folder"):
        repair_data_set(report, VerifyConfig(repair=True, model=str(tmp_path / "none"), device="cpu"))
    other = tiny_models.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was begun with other settings: encoder\.vae"):
        repair_data_set(report, VerifyConfig(repair=True, model=str(other), device="cpu"))
    settings = (folder / "encode.yaml").read_text()
    table = tiny_models.write_csv(tmp_path / "rows.csv", [(clips / "clip-0.mp4", "another prompt")] * 6)
    (folder / "encode.yaml").write_text("\n".join([f"data: {table}", *settings.splitlines()[1:]]))
    with pytest.raises(ValueError, match="changed since"):
        repair_data_set(report, CPU)
    assert hashes(folder) == before
    (folder / "encode.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds no encode\.yaml"):
        repair_data_set(report, CPU)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(None, "No such file"), ([("clip-0.mp4", "another")] * 6, "lines 2, 3 changed"), ([("a", "b")], "fewer rows")],
)
def test_nothing_is_deleted_where_a_sidecar_is_damaged_and_the_csv_does_not_fit(
    rows: list[tuple[str, str]] | None, message: str, complete_set: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    broken = {"shard-000000.json", "shard-000001.json"} if message == "fewer rows" else {"shard-000001.json"}
    for name in broken:
        flip(folder / name, 300)
    if rows is not None:
        tiny_models.write_csv(tmp_path / "rows.csv", rows)
    settings = (folder / "encode.yaml").read_text().splitlines()[1:]
    (folder / "encode.yaml").write_text("\n".join([f"data: {tmp_path / 'rows.csv'}", *settings]))
    report, before = verify_data_set(folder), hashes(folder)
    assert {problem.file for problem in report.problems} == broken
    with pytest.raises(ValueError, match=message):
        repair_data_set(report, CPU)
    assert hashes(folder) == before


def test_relative_paths_are_mended_from_another_folder(
    complete_set: Path, clips: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(model)
    tiny_models.write_csv(tmp_path / "rows.csv", [(clips / "clip-0.mp4", "a"), (clips / "clip-1.mp4", "b")])
    monkeypatch.chdir(tmp_path)
    encode(configure(Path("rows.csv"), Path("model"), Path("set"), shard_size=1))
    before = hashes(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "elsewhere")
    flip(tmp_path / "set" / "shard-000001.json", 300)
    repair_data_set(verify_data_set(tmp_path / "set"), CPU)
    assert hashes(tmp_path / "set") == before
    assert configure(Path("x"), Path("OWNER/NAME"), Path("y")).with_absolute_paths.model == "OWNER/NAME"


def test_a_data_set_moved_with_its_csv_is_repaired(clips: Path, model: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(clips, tmp_path / "old"))
    rows = [(f"clip-{i}.mp4", f"prompt {i}") for i in range(4)]
    config = configure(tiny_models.write_csv(old / "rows.csv", rows), model, old / "set", shard_size=2)
    encode(config)
    new = old.rename(tmp_path / "new")
    before = hashes(new / "set")
    flip(new / "set" / "shard-000001.tar", 3000)
    with pytest.raises(ValueError, match=r"^data=.*/old/rows.csv: No such file"):
        repair_data_set(verify_data_set(new / "set"), CPU)
    moved = VerifyConfig(device="cpu", data=str(new / "rows.csv"))
    assert repair_data_set(verify_data_set(new / "set"), moved).records == 4
    assert hashes(new / "set") == before
    flip(new / "set" / "shard-000000.tar", 3000)
    shutil.copy(new / "rows.csv", tmp_path)
    elsewhere = VerifyConfig(device="cpu", data=str(tmp_path / "rows.csv"), base_folder=str(new))
    assert repair_data_set(verify_data_set(new / "set"), elsewhere).records == 4
    assert hashes(new / "set") == before


DAMAGED_SETTINGS = {
    "plan cut": ("plan.json", lambda text: text[: len(text) // 2]),
    "plan empty": ("plan.json", lambda text: ""),
    "plan a list": ("plan.json", lambda text: "[]"),
    "plan without a field": ("plan.json", lambda text: text.replace('"batch_size"', '"batch"')),
    "plan, a word for a number": ("plan.json", lambda text: text.replace('"shard_size": 2', '"shard_size": "2"')),
    "plan, another height": ("plan.json", lambda text: text.replace('"height": 64', '"height": 96')),
    "plan, another encoder": ("plan.json", lambda text: text.replace('"text_dtype": "float32"', '"text_dtype": "x"')),
    "plan, another shard size": ("plan.json", lambda text: text.replace('"shard_size": 2', '"shard_size": 3')),
    "options cut": ("encode.yaml", lambda text: text[:9]),
    "options empty": ("encode.yaml", lambda text: ""),
    "options a list": ("encode.yaml", lambda text: "- a"),
    "options no YAML": ("encode.yaml", lambda text: "{[" + text),
    "options, zero bytes": ("encode.yaml", lambda text: text[:50] + "\0" * 50),
    "options, another batch": ("encode.yaml", lambda text: text.replace("batch_size: 8", "batch_size: 9")),
    "options, another prompt": ("encode.yaml", lambda text: text.replace("negative_prompt: ", "negative_prompt: x")),
}


@pytest.mark.parametrize("kind", DAMAGED_SETTINGS)
def test_damaged_settings_are_found_and_written_again(kind: str, complete_set: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    name, damage = DAMAGED_SETTINGS[kind]
    text = (folder / name).read_text()
    (folder / name).write_text(damage(text))
    assert (folder / name).read_text() != text
    report = verify_data_set(folder)
    assert [problem.file for problem in report.problems] == [name]
    assert "\n" not in str(report.problems[0])
    if name == "plan.json":
        repair_data_set(report, CPU)
        assert (folder / name).read_text() == text and verify_data_set(folder).problems == ()
    else:
        with pytest.raises(ValueError, match=r"^shards=.*: encode\.yaml: .*; the same encode command writes it again$"):
            repair_data_set(report, CPU)
        table = complete_set.parent / "rows.csv"
        model = text.split("model: ")[1].splitlines()[0]
        encode(configure(table, Path(model), folder, shard_size=2, max_failure_rate=0.5))
        assert verify_data_set(folder).problems == ()
    assert (folder / "shard-000000.tar").is_file()


def test_a_data_set_without_settings_is_sound(complete_set: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    for name in ("plan.json", "encode.yaml"):
        (folder / name).unlink()
    assert verify_data_set(folder).problems == ()


def test_the_picture_shows_each_record(complete_set: Path, model: Path, tmp_path: Path) -> None:
    report = verify_data_set(complete_set)
    path = draw_contact_sheet(
        report, VerifyConfig(model=str(model), sheet=str(tmp_path / "a" / "sheet.png"), device="cpu")
    )
    sheet = numpy.asarray(Image.open(path))
    height = CELL_WIDTH * 64 // 96
    assert sheet.shape == (height + LABEL_HEIGHT, PICTURES_PER_ROW * CELL_WIDTH, 3)
    cells = [sheet[:height, i * CELL_WIDTH : (i + 1) * CELL_WIDTH].astype(float) for i in range(PICTURES_PER_ROW)]
    assert open_data_set(complete_set).num_records == 5
    assert all(cell.std() > 1 for cell in cells[:5]), "pictures"
    assert all((cell == 255).all() for cell in cells[5:]), "the rest is empty"
    assert any((cells[0] != cell).any() for cell in cells[1:5])


def test_a_broken_record_is_left_out_of_the_picture(complete_set: Path, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(complete_set, tmp_path / "set")
    (folder / "shard-000000.tar").unlink()
    config = VerifyConfig(model=str(model), sheet=str(tmp_path / "sheet.png"), device="cpu")
    sheet = numpy.asarray(Image.open(draw_contact_sheet(verify_data_set(folder), config)))
    assert [(sheet[:, i * CELL_WIDTH : (i + 1) * CELL_WIDTH] != 255).any() for i in range(4)] == [
        True,
        True,
        True,
        False,
    ]


def test_another_vae_draws_nothing(complete_set: Path, tmp_path: Path) -> None:
    other = tiny_models.make_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="its VAE is not the one"):
        draw_contact_sheet(
            verify_data_set(complete_set), VerifyConfig(model=str(other), sheet=str(tmp_path / "s.png"), device="cpu")
        )
    with pytest.raises(ValueError, match=r"must end in \.png or \.jpg"):
        VerifyConfig(sheet="sheet")


def test_a_sheet_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="^sheet=frames.png: .*; give --model too$"):
        VerifyConfig(sheet="frames.png")
    with pytest.raises(ValueError, match="^model=M: verify alone needs none; give --sheet FILE.png or --repair too$"):
        VerifyConfig(model="M")
