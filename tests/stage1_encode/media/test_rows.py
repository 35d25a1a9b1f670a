"""CSV tables of every kind are read; bad lines are reported one by one."""

from pathlib import Path

import pytest

from stage1_encode.encode import encode
from stage1_encode.media.rows import read_shard_rows, rows_digest
from tests.stage1_encode.test_encode import configure, failures, records

CLIP = "clip-0.mp4"
TABLES = {
    "byte order mark": f"\ufeffvideo,prompt\n{CLIP},a\n".encode(),
    "semicolons": f"video;prompt\n{CLIP};a, b\n".encode(),
    "tabs": f"prompt\tvideo\na, b\t{CLIP}\n".encode(),
    "windows": f"video,prompt\r\n{CLIP},a\r\n\r\n".encode(),
    "more columns": f'id,Path , Text,num_frames\n7,{CLIP},"a ""b"", c",81\n'.encode(),
    "embedded new line": f'video,prompt\n{CLIP},"a\n\nb"\n'.encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_every_kind(kind: str, clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / CLIP).symlink_to(clips / CLIP)
    (tmp_path / "rows.csv").write_bytes(TABLES[kind])
    encode(configure(tmp_path / "rows.csv", model, tmp_path / "out"))
    (record,) = records(tmp_path / "out")
    expected = {"semicolons": "a, b", "tabs": "a, b", "more columns": 'a "b", c', "embedded new line": "a b"}
    assert record.source.prompt == expected.get(kind, "a")
    assert record.source.line == 2


def test_bad_lines_of_a_table_are_reported_one_by_one(clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / CLIP).symlink_to(clips / CLIP)
    lines = [f"{CLIP},good", f"{CLIP},a, b", CLIP, "", f'{CLIP},"two\nlines"', f"{CLIP},good", f"{CLIP},good"]
    (tmp_path / "rows.csv").write_bytes(
        "\n".join(["video,prompt", *lines, ""]).encode() + CLIP.encode() + b",caf\xe9\n"
    )
    encode(configure(tmp_path / "rows.csv", model, tmp_path / "out", shard_size=16, max_failure_rate=1.0))
    results = [(int(row["line"]), row["reason"]) for row in failures(tmp_path / "out")]
    assert [line for line, _ in results] == [3, 4, 10]
    assert "3 columns where the header has 2" in results[0][1]
    assert [reason for _, reason in results[1:]] == ["the prompt is empty", "the line is not UTF-8"]
    encoded = records(tmp_path / "out")
    assert [record.source.line for record in encoded] == [2, 6, 8, 9]
    assert len({record.key for record in encoded}) == 4  # equal rows are two records


def test_digest_of_rows_stays(tmp_path: Path) -> None:
    """Sidecars hold this digest, so neither the fields of a row nor the wording of its problem may change."""
    (tmp_path / "rows.csv").write_text("video,prompt,seed\na.mp4,a,7\n,b,\n")
    (rows,) = read_shard_rows(tmp_path / "rows.csv", shard_size=4, text_only=False)
    assert rows_digest(rows) == "7f1df2f8a5b22d41e76c9fd51372deafa5a30d1d0926ce28fde18f60f1f4c89a"
