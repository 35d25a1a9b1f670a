"""CSV -> `Row`. The rows k*n .. k*n+n-1 are shard k of n rows: a pure function of the file."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import IO

VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS = (
    ("video", "path", "image"),
    ("prompt", "text"),
    ("seed",),
)  # accepted names, the first wins
DELIMITERS = ",;\t"
URL_PREFIXES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Row:
    """One clip as the CSV has it."""

    number: int  # place in the CSV, counted from 0
    line: int  # of the CSV, counted from 1
    path: str  # as written; "" = text only
    prompt: str
    seed: int | None
    problem: str  # why it cannot be encoded; "" = nothing known yet

    @property
    def key(self) -> str:
        """Key of the row's record, unique in the data set."""
        return f"{self.number:09d}"


@dataclass(frozen=True)
class CsvColumns:
    """Where a CSV keeps what; -1 = nowhere."""

    delimiter: str
    count: int
    video: int
    prompt: int
    seed: int


def locate_file(csv_path: Path, path: str) -> str:
    """Path of a row's file: relative ones start at the CSV's folder, web addresses stay."""
    return path if path.startswith(URL_PREFIXES) else str(csv_path.absolute().parent / path)


def rows_digest(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of rows, the same wherever they stand in memory."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(astuple(row)).encode() + b"\n")
    return digest.hexdigest()


def read_shard_rows(table: Path, *, shard_size: int, text_only: bool) -> Iterator[list[Row]]:
    """The rows of shard 0, 1, ..., read as they are asked for.

    Raises ValueError for a file that cannot be read, has no rows or lacks a column.
    """
    rows = _read_rows(table, text_only)
    shard = list(islice(rows, shard_size))
    if not shard:
        raise ValueError(f"data={table}: has a header and no rows")
    while shard:
        yield shard
        shard = list(islice(rows, shard_size))


@contextmanager
def _open_table(table: Path) -> Iterator[IO[str]]:
    try:
        file = table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise ValueError(f"data={table}: {error.strerror or error}") from error
    with file:
        yield file


def _read_rows(table: Path, text_only: bool) -> Iterator[Row]:
    with _open_table(table) as file:
        columns = find_columns(table, file.readline(), text_only)
        reader = csv.reader(file, delimiter=columns.delimiter, strict=True)
        number, line = 0, 2
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield _to_row(number, line, fields, columns, text_only)
                    number += 1
                line = reader.line_num + 2
        except csv.Error as error:
            raise ValueError(f"data={table}: line {line}: {error}; is a quote left open?") from error


def find_columns(table: Path, header: str, text_only: bool) -> CsvColumns:
    """Find the needed columns in a header line, separated by commas, semicolons or tabs; ValueError without them."""
    if not header.strip():
        raise ValueError(f"data={table}: is empty; needs a header line with columns video and prompt")
    required = (
        {"prompt (or text)": PROMPT_COLUMNS}
        if text_only
        else {"video (or path)": VIDEO_COLUMNS, "prompt (or text)": PROMPT_COLUMNS}
    )
    best_match: dict[str, list[str]] = {}  # what is lacking -> the names found, for the delimiter that lacks least
    for delimiter in sorted(DELIMITERS, key=header.count, reverse=True):
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
        missing = [label for label, aliases in required.items() if _column_index(names, aliases) < 0]
        if not missing:
            video, prompt, seed = (
                _column_index(names, aliases) for aliases in (VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS)
            )
            return CsvColumns(delimiter, len(names), video, prompt, seed)
        best_match = best_match or {" and ".join(missing): names}
    for missing_text, names in best_match.items():
        present = ", ".join(names).encode("utf-8", "replace").decode()
        raise ValueError(f"data={table}: lacks the column {missing_text}; found {present}")
    raise AssertionError(header)


def _column_index(names: list[str], aliases: tuple[str, ...]) -> int:
    return next((names.index(name) for name in aliases if name in names), -1)


def _to_row(number: int, line: int, fields: list[str], columns: CsvColumns, text_only: bool) -> Row:
    cleaned = [field.encode("utf-8", "replace").decode() for field in fields]
    path, prompt, seed = (
        cleaned[index] if 0 <= index < len(cleaned) else "" for index in (columns.video, columns.prompt, columns.seed)
    )
    has_seed = seed.strip().isascii() and seed.strip().isdigit()
    problem = ""
    if cleaned != fields:
        problem = "the line is not UTF-8"
    elif len(fields) > columns.count:
        problem = f"{len(fields)} columns where the header has {columns.count}; a prompt with commas needs quotes"
    elif not path.strip() and not text_only:
        problem = "no video given"
    elif seed.strip() and not has_seed:
        problem = f"seed {seed.strip()!r} is not a whole number"
    return Row(number, line, path.strip(), prompt, int(seed) if has_seed else None, problem)
