"""CSV tables of every kind are read; bad lines are reported one by one."""

import os
import shutil
from pathlib import Path

import pytest

from stage1_encode.encode import encode
from stage1_encode.media import csv_table
from stage1_encode.media.first_frame import UnreadableError, read_first_frame
from stage1_encode.media.rows import Row, locate_file, read_shard_rows, rows_digest
from tests import tiny_models
from tests.stage1_encode.test_encode import configure, failures, hashes, records

CLIP = "clip-0.mp4"
TABLES = {
    "byte order mark": f"\ufeffvideo,prompt\n{CLIP},a\n".encode(),
    "semicolons": f"video;prompt\n{CLIP};a, b\n".encode(),
    "tabs": f"prompt\tvideo\na, b\t{CLIP}\n".encode(),
    "windows": f"video,prompt\r\n{CLIP},a\r\n\r\n".encode(),
    "more columns": f'id,Path , Text,num_frames\n7,{CLIP},"a ""b"", c",81\n'.encode(),
    "embedded new line": f'video,prompt\n{CLIP},"a\n\nb"\n'.encode(),
    "space before a quote": f'video, prompt\n{CLIP}, "a, ""b"""\n'.encode(),
    "spaces around quotes": f'"video" , "prompt"\n"{CLIP}"  ,  "a, b" \n'.encode(),
    "space before a quote, new line": f'video,prompt\n{CLIP}, "a\nb"\n'.encode(),
    "space before a quote of the text": f'video,prompt\n{CLIP}, "Hi" she said\n'.encode(),
    "space before a quote that stays open": f'video,prompt\n{CLIP}, "tis\n'.encode(),
    "carriage returns": f"video,prompt\r{CLIP},a\r".encode(),
    "no last line end": f"video,prompt\n{CLIP},a".encode(),
    "blank lines first": f"\n , \n\nvideo,prompt\n{CLIP},a\n".encode().replace(b" , ", b"  "),
    "utf-16": f"video,prompt\n{CLIP},é\n".encode("utf-16"),
    "utf-16 big endian": b"\xfe\xff" + f"video;prompt\n{CLIP};é\n".encode("utf-16-be"),
    "utf-32": f"video\tprompt\r\n{CLIP}\té\r\n".encode("utf-32"),
    "200 kB beside": f"video,prompt,meta\n{CLIP},a,{'y' * 200_000}\n".encode(),
    "200 kB in quotes": f'video,meta,prompt\n{CLIP},"{"{k: 1}," * 20_000}",a\n'.encode(),
    "web column with line ends": f'video,"more\nwords",prompt\n{CLIP},,a\n'.encode(),
}
PROMPTS = {
    "semicolons": "a, b",
    "tabs": "a, b",
    "more columns": 'a "b", c',
    "embedded new line": "a b",
    "space before a quote": 'a, "b"',
    "spaces around quotes": "a, b",
    "space before a quote, new line": "a b",
    "space before a quote of the text": '"Hi" she said',
    "space before a quote that stays open": '"tis',
    "utf-16": "é",
    "utf-16 big endian": "é",
    "utf-32": "é",
}
LINES = {"blank lines first": 5, "web column with line ends": 3}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_every_kind(kind: str, clips: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / CLIP).symlink_to(clips / CLIP)
    (tmp_path / "rows.csv").write_bytes(TABLES[kind])
    encode(configure(tmp_path / "rows.csv", model, tmp_path / "out"))
    (record,) = records(tmp_path / "out")
    assert record.source.prompt == PROMPTS.get(kind, "a")
    assert record.source.line == LINES.get(kind, 2)


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


def read_rows(text: str | bytes, folder: Path, **options: int) -> list[Row]:
    """All rows of a table."""
    (folder / "rows.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    shards = read_shard_rows(folder / "rows.csv", shard_size=3, text_only=False, **options)
    return [row for shard in shards for row in shard]


@pytest.mark.parametrize(
    "wrong",
    [
        'b.mp4,"he said \\"hi\\" to me"',
        'b.mp4,"he said \\""',
        'b.mp4,"\\"hi\\" he said"',
        'b.mp4,"left open',
        'b.mp4,"closed" too early',
        '"b.mp4,left open',
        'b.mp4,"',
        'b.mp4,"""',
    ],
)
def test_a_wrong_quote_fails_its_line_alone(wrong: str, tmp_path: Path) -> None:
    rows = read_rows(f'video,prompt\na.mp4,"one"\n{wrong}\nc.mp4,"th""ree"\nd.mp4,four\n{wrong}\n', tmp_path)
    assert [(row.line, row.prompt) for row in rows] == [(2, "one"), (3, ""), (4, 'th"ree'), (5, "four"), (6, "")]
    assert [bool(row.problem) for row in rows] == [False, True, False, False, True]
    assert 'write "" for a quote and not \\"' in rows[1].problem


def test_a_quote_that_is_left_open_does_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_table, "MAX_ROW_CHARACTERS", 1000)
    rows = read_rows('video,prompt\na.mp4,"open\n' + "b.mp4,fine\n" * 500 + 'c.mp4,"closed"\n', tmp_path)
    assert len(rows) == 502 and [row.number for row in rows if row.problem] == [0]
    with pytest.raises(ValueError, match=r"^data=.*: line 2: has a line of more than [^\n]*give a CSV$"):
        read_rows("video,prompt\na.mp4,b\n" + "x" * 2000, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,prompt\na.mp4,b\n".encode("utf-16-le"), "is not text, or UTF-16 without its mark; save it as UTF-8"),
        (b"\xff\xfe" + "video,prompt\n".encode("utf-16-le") + b"a\xd8b\xdcc", "is not utf-16-le; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "lacks the column"),
        (b"sep=;\nvideo;prompt\na;b\n", "found sep="),
        (b"caf\xe9,prompt\na,b\n", "found caf"),
        ("\x1b[31mred\x07,b\n", r"found \?\[31mred\?, b"),
        (",".join(f"column{n}" for n in range(99)), r"column11, \.\.\.$"),
        (b"\n\n  \n", "is empty"),
    ],
)
def test_what_is_no_table_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_rows(text, tmp_path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


def test_a_zero_byte_fails_its_row(tmp_path: Path) -> None:
    rows = read_rows("video,prompt,x\na\0.mp4,b,\na.mp4,b,\0\na.mp4,b\0,\n", tmp_path)
    assert [row.problem for row in rows] == ["the path holds a zero byte", "", ""]


@pytest.mark.parametrize("seed", ["nan", "inf", "-1", "1e3", "1.0", "9" * 19, "9" * 5000, "٣", "0x1"])
def test_what_is_no_seed_fails_its_row(seed: str, tmp_path: Path) -> None:
    rows = read_rows(f"video,prompt,seed\na.mp4,b,{seed}\na.mp4,b,{'9' * 18}\na.mp4,b,\n", tmp_path)
    assert [(row.seed, bool(row.problem)) for row in rows] == [(None, True), (10**18 - 1, False), (None, False)]
    assert len(rows[0].problem) < 100


def test_rows_that_are_all_wrong_are_refused_at_once(tmp_path: Path) -> None:
    wrong = "video,prompt\n" + "a.mp4,a, b\n" * 7 + ",x\n" * 3
    assert len(read_rows(wrong, tmp_path)) == 10
    assert len(read_rows(f"{wrong}a.mp4,fine\n", tmp_path, stop_after_failures=11)) == 11
    with pytest.raises(ValueError, match=r"line 2 and all others up to 11 fail: 7 x 3 columns .*; 3 x no video given$"):
        read_rows(f"{wrong}a.mp4,fine\n", tmp_path, stop_after_failures=10)
    with pytest.raises(ValueError, match="line 2 and all others up to 11 fail"):
        read_rows(wrong, tmp_path, stop_after_failures=50)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("s3://bucket/a.mp4", "is an address"),
        ("GS://bucket/a.mp4", "is an address"),
        ("hf://datasets/o/n/a.mp4", "is an address"),
        ("file:///data/a.mp4", "give the path without file://"),
        ("ftp://host/a.mp4", "is an address"),
        ("~/clips/a.mp4", "begins with ~"),
        ("~me/a.mp4", "begins with ~"),
        ("$HOME/a.mp4", "names a variable"),
        ("${DATA}/a.mp4", "names a variable"),
        ("%USERPROFILE%/a.mp4", "names a variable"),
        ("clips\\a.mp4", "is written with backslashes"),
        ("C:\\clips\\a.mp4", "is written with backslashes"),
        ("D:/clips/a.mp4", "begins with the letter of a drive"),
        ("a:b.mp4", "does not exist"),
        ("pipe:1", "does not exist"),
        ("concat:a.mp4|b.mp4", "does not exist"),
    ],
)
def test_a_path_that_was_meant_for_something_else_is_named(path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=f"^[^\n]*{reason}"):
        read_first_frame(locate_file(tmp_path / "rows.csv", path), height=64, width=96)


@pytest.mark.parametrize("name", ["s3:", "~", "$HOME", "a\\b", "C:"])
def test_such_a_path_is_read_where_it_exists(name: str, clips: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    shutil.copy(clips / CLIP, tmp_path / name)
    frame = read_first_frame(locate_file(tmp_path / "rows.csv", f"{name}/{CLIP}"), height=64, width=96)
    assert frame.size == (64, 96)


def test_paths_start_at_the_base_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_file(Path("t/rows.csv"), "a.mp4") == str(tmp_path / "t/a.mp4")
    assert locate_file(Path("t/rows.csv"), "a.mp4", "clips") == str(tmp_path / "clips/a.mp4")
    assert locate_file(Path("t/rows.csv"), "/b/a.mp4", "clips") == "/b/a.mp4"
    assert locate_file(Path("/dev/fd/63"), "a.mp4") == str(tmp_path / "a.mp4")
    assert locate_file(Path("t/rows.csv"), "HTTPS://Host/A.mp4", "clips") == "https://Host/A.mp4"


def test_a_table_from_a_pipe_is_read_once(clips: Path, model: Path, tmp_path: Path) -> None:
    end, start = os.pipe()
    with os.fdopen(start, "w") as file:
        file.write(f"video,prompt\n{CLIP},a\n")
    config = configure(Path(f"/dev/fd/{end}"), model, tmp_path / "out", base_folder=str(clips))
    encode(config)
    os.close(end)
    assert [record.source.prompt for record in records(tmp_path / "out")] == ["a"]
    assert f"base_folder: {clips}\n" in (tmp_path / "out" / "encode.yaml").read_text()


def test_the_base_folder_is_no_part_of_a_data_set(clips: Path, model: Path, tmp_path: Path) -> None:
    table = tiny_models.write_csv(tmp_path / "rows.csv", [(CLIP, "a")])
    encode(configure(table, model, tmp_path / "one", base_folder=str(clips)))
    shutil.copy(clips / CLIP, tmp_path)
    report = encode(configure(table, model, tmp_path / "one"))  # the same rows and clips, found in another way
    encode(configure(table, model, tmp_path / "two"))
    assert report.records == 1 and hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert "base_folder: null\n" in (tmp_path / "two" / "encode.yaml").read_text()


def test_digest_of_rows_stays(tmp_path: Path) -> None:
    """Sidecars hold this digest, so neither the fields of a row nor the wording of its problem may change."""
    (tmp_path / "rows.csv").write_text("video,prompt,seed\na.mp4,a,7\n,b,\n")
    (rows,) = read_shard_rows(tmp_path / "rows.csv", shard_size=4, text_only=False)
    assert rows_digest(rows) == "7f1df2f8a5b22d41e76c9fd51372deafa5a30d1d0926ce28fde18f60f1f4c89a"
