"""CSV -> `Row`. Shard k holds rows k*n to k*n+n-1, where n is the shard size: a pure function of the file."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

# Accepted column names; if a CSV has several of them, the first counts.
VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS = ("video", "path", "image"), ("prompt", "text"), ("seed",)
DELIMITERS = ",;\t"
URL_PREFIXES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the CSV."""

    number: int  # index of the row, counted from 0
    line: int  # first line of the row in the file, counted from 1
    path: str  # as written; "" = text only
    prompt: str
    seed: int | None
    problem: str  # why the row cannot be encoded; "" = none known yet

    @property
    def key(self) -> str:
        """Key of the row's record, unique in the data set."""
        return f"{self.number:09d}"

    def problem_with(self, prompt: str) -> str:
        """Why the row cannot be encoded, given its cleaned prompt; "" if nothing is known against it."""
        return self.problem or ("" if prompt else "the prompt is empty")


@dataclass(frozen=True)
class CsvColumns:
    """Layout of a CSV: indices of its columns; -1 = the column is missing."""

    delimiter: str
    count: int
    video: int
    prompt: int
    seed: int


def locate_file(csv_path: Path, path: str) -> str:
    """Path of a row's file: relative paths start at the CSV's folder, web addresses stay as they are."""
    return path if path.startswith(URL_PREFIXES) else str(csv_path.absolute().parent / path)


def rows_digest(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of the fields of rows, stored in the sidecar of their shard."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(astuple(row)).encode() + b"\n")
    return digest.hexdigest()


def read_shard_rows(csv_path: Path, *, shard_size: int, text_only: bool) -> Iterator[list[Row]]:
    """Yield the rows of shard 0, 1, ..., reading the file as they are requested.

    Raises ValueError if the file cannot be read, has no rows or lacks a column.
    """
    rows = _read_rows(csv_path, text_only)
    shard = list(islice(rows, shard_size))
    if not shard:
        raise ValueError(f"data={csv_path}: has a header and no rows")
    while shard:
        yield shard
        shard = list(islice(rows, shard_size))


def _read_rows(csv_path: Path, text_only: bool) -> Iterator[Row]:
    try:
        # surrogateescape keeps bytes that are not UTF-8, so that only their own row fails
        file = csv_path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise ValueError(f"data={csv_path}: {error.strerror or error}") from error
    with file:
        columns = find_columns(csv_path, file.readline(), text_only)
        reader = csv.reader(file, delimiter=columns.delimiter, strict=True)
        number, line = 0, 2
        try:
            for fields in reader:
                if any(field.strip() for field in fields):  # blank lines are no rows
                    yield _parse_row(number, line, fields, columns, text_only)
                    number += 1
                line = reader.line_num + 2  # a quoted field may span lines; the header line was read before
        except csv.Error as error:
            raise ValueError(f"data={csv_path}: line {line}: {error}; is a quote left open?") from error


def find_columns(csv_path: Path, header: str, text_only: bool) -> CsvColumns:
    """Find the columns in a header line separated by commas, semicolons or tabs; ValueError if one is missing."""
    if not header.strip():
        raise ValueError(f"data={csv_path}: is empty; needs a header line with columns video and prompt")
    error = ""
    for delimiter in sorted(DELIMITERS, key=header.count, reverse=True):
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
        video, prompt, seed = (
            next((names.index(name) for name in aliases if name in names), -1)
            for aliases in (VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS)
        )
        missing = ["video (or path)"] * (video < 0 and not text_only) + ["prompt (or text)"] * (prompt < 0)
        if not missing:
            return CsvColumns(delimiter, len(names), video, prompt, seed)
        present = ", ".join(names).encode("utf-8", "replace").decode()
        # the most frequent delimiter is the likely one, so the error describes its columns
        error = error or f"data={csv_path}: lacks the column {' and '.join(missing)}; found {present}"
    raise ValueError(error)


def _parse_row(number: int, line: int, fields: list[str], columns: CsvColumns, text_only: bool) -> Row:
    texts = [field.encode("utf-8", "replace").decode() for field in fields]
    path, prompt, seed = (
        texts[index] if 0 <= index < len(texts) else "" for index in (columns.video, columns.prompt, columns.seed)
    )
    path, digits = path.strip(), seed.strip()
    has_seed = digits.isascii() and digits.isdigit()
    problem = ""  # its wording is part of `rows_digest`: a change would make finished data sets look changed
    if texts != fields:
        problem = "the line is not UTF-8"
    elif len(fields) > columns.count:
        problem = f"{len(fields)} columns where the header has {columns.count}; a prompt with commas needs quotes"
    elif not path and not text_only:
        problem = "no video given"
    elif digits and not has_seed:
        problem = f"seed {digits!r} is not a whole number"
    return Row(number, line, path, prompt, int(seed) if has_seed else None, problem)
