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

VIDEO, PROMPT, SEED = ("video", "path", "image"), ("prompt", "text"), ("seed",)  # accepted names, the first wins
DELIMITERS = ",;\t"
REMOTE = ("http://", "https://")


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
class Columns:
    """Where a CSV keeps what; -1 = nowhere."""

    delimiter: str
    count: int
    video: int
    prompt: int
    seed: int


def locate_file(table: Path, path: str) -> str:
    """Path of a row's file: relative ones start at the CSV's folder, web addresses stay."""
    return path if path.startswith(REMOTE) else str(table.absolute().parent / path)


def rows_digest(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of rows, the same wherever they stand in memory."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(astuple(row)).encode() + b"\n")
    return digest.hexdigest()


def read_shards(table: Path, *, shard_size: int, text_only: bool) -> Iterator[list[Row]]:
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
def _opened(table: Path) -> Iterator[IO[str]]:
    try:
        file = table.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise ValueError(f"data={table}: {error.strerror or error}") from error
    with file:
        yield file


def _read_rows(table: Path, text_only: bool) -> Iterator[Row]:
    with _opened(table) as file:
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


def find_columns(table: Path, header: str, text_only: bool) -> Columns:
    """Find the needed columns in a header line, separated by commas, semicolons or tabs; ValueError without them."""
    if not header.strip():
        raise ValueError(f"data={table}: is empty; needs a header line with columns video and prompt")
    wanted = {"prompt (or text)": PROMPT} if text_only else {"video (or path)": VIDEO, "prompt (or text)": PROMPT}
    best: dict[str, list[str]] = {}  # what is lacking -> the names found, for the delimiter that lacks least
    for delimiter in sorted(DELIMITERS, key=header.count, reverse=True):
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
        lacking = [label for label, aliases in wanted.items() if _place(names, aliases) < 0]
        if not lacking:
            video, prompt, seed = (_place(names, aliases) for aliases in (VIDEO, PROMPT, SEED))
            return Columns(delimiter, len(names), video, prompt, seed)
        best = best or {" and ".join(lacking): names}
    for lacking_text, names in best.items():
        found = ", ".join(names).encode("utf-8", "replace").decode()
        raise ValueError(f"data={table}: lacks the column {lacking_text}; found {found}")
    raise AssertionError(header)


def _place(names: list[str], aliases: tuple[str, ...]) -> int:
    return next((names.index(name) for name in aliases if name in names), -1)


def _to_row(number: int, line: int, fields: list[str], columns: Columns, text_only: bool) -> Row:
    clean = [field.encode("utf-8", "replace").decode() for field in fields]
    path, prompt, seed = (
        clean[place] if 0 <= place < len(clean) else "" for place in (columns.video, columns.prompt, columns.seed)
    )
    number_given = seed.strip().isascii() and seed.strip().isdigit()
    problem = ""
    if clean != fields:
        problem = "the line is not UTF-8"
    elif len(fields) > columns.count:
        problem = f"{len(fields)} columns where the header has {columns.count}; a prompt with commas needs quotes"
    elif not path.strip() and not text_only:
        problem = "no video given"
    elif seed.strip() and not number_given:
        problem = f"seed {seed.strip()!r} is not a whole number"
    return Row(number, line, path.strip(), prompt, int(seed) if number_given else None, problem)
