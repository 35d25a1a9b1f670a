"""What a record and its sidecar tell of a first frame: pictures, converted colors, empty frames."""

import json
import tarfile
from pathlib import Path

from PIL import Image

from shards.verification.verify import verify_data_set
from stage1_encode.config import EncodeConfig
from stage1_encode.encode import describe_cost, encode
from tests import tiny_models
from tests.stage1_encode.media.test_color import PATCHES, Tags, patch_video
from tests.stage1_encode.test_encode import configure, failures, records


def test_a_picture_stands_in_for_a_video(clips: Path, model: Path, tmp_path: Path) -> None:
    Image.fromarray(tiny_models.picture(80, 160, seed=3)).save(tmp_path / "picture.png")
    table = tiny_models.write_csv(tmp_path / "rows.csv", [("picture.png", "a picture")], ["path", "text"])
    encode(configure(table, model, tmp_path / "out"))
    (record,) = records(tmp_path / "out")
    assert record.source.size == (80, 160)
    assert json.loads((tmp_path / "out/plan.json").read_text())["shard_size"] == 4


def test_colors_that_were_converted_or_assumed_are_told(model: Path, tmp_path: Path) -> None:
    hlg = Tags(matrix=9, curve=18, primaries=9)
    patch_video(tmp_path / "hdr.mkv", PATCHES / 255, hlg, bits=10)
    patch_video(tmp_path / "hd.mp4", PATCHES / 255, Tags(matrix=2), height=720)
    patch_video(tmp_path / "sd.mp4", PATCHES / 255, Tags())
    names = ("hdr.mkv", "hd.mp4", "sd.mp4")
    table = tiny_models.write_csv(tmp_path / "rows.csv", [(tmp_path / name, name) for name in names])
    report = encode(configure(table, model, tmp_path / "out"))
    assert {item.note: item.records for item in report.notes} == {"HLG to SDR": 1, "untagged HD read as BT.601": 1}
    # a file that is read as ever has the record that it always had
    assert [record.source.color for record in records(tmp_path / "out")] == ["HLG to SDR", "", ""]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        stored = [json.load(tar.extractfile(name)) for name in tar.getnames()[1::2]]
    assert ["color" in fields for fields in stored] == [True, False, False]
    assert encode(configure(table, model, tmp_path / "out")).notes == report.notes  # from the sidecars
    options = {"hdr": "refuse", "untagged_hd": "bt709", "max_failure_rate": 1.0}
    report = encode(configure(table, model, tmp_path / "other", **options))
    assert [record.source.color for record in records(tmp_path / "other")] == ["untagged HD read as BT.709", ""]
    assert [failure["reason"][:12] for failure in failures(tmp_path / "other")] == ["is HDR (HLG)"]


def test_empty_first_frames_are_counted(clips: Path, model: Path, tmp_path: Path) -> None:
    for name, color in (("black", 0), ("grey", 128), ("green", (0, 135, 0))):
        Image.new("RGB", (96, 64), color if name == "green" else (color,) * 3).save(tmp_path / f"{name}.png")
    paths = [clips / "clip-0.mp4", *(tmp_path / f"{name}.png" for name in ("black", "grey", "green"))]
    table = tiny_models.write_csv(tmp_path / "rows.csv", [(path, "a picture") for path in paths])
    report = encode(configure(table, model, tmp_path / "out", shard_size=2))
    counts = {"first frame of a single color": 2, "black first frame": 1}
    assert {item.note: item.records for item in report.notes} == counts
    verified = verify_data_set(tmp_path / "out")
    assert verified.notes == counts and "1 records: black first frame" in verified.format_lines()


def test_a_sidecar_without_notes_is_that_of_earlier_versions(dataset: Path) -> None:
    assert set(json.loads((dataset / "shard-000000.json").read_text())) == {
        "shard",
        "rows_sha256",
        "members",
        "failures",
    }


def test_predicted_cost_of_rows() -> None:
    """66.0 records/s and 17.0 GiB at 720p on one H200 (benchmarks/results/rebuild-*)."""
    config = EncodeConfig("clips.csv", "model", "out")
    text = describe_cost(config, 100_000, "NVIDIA H200, 139.8 GiB")
    assert text == "100000 rows to encode: about 65/s, 26 min, 17.0 GiB per GPU"
    assert "not measured" in describe_cost(config, 1, "NVIDIA A100-SXM4-80GB, 79.1 GiB")
