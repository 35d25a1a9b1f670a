"""CSV -> `Row`. Shard k holds rows k*n to k*n+n-1, where n is the shard size: a pure function of the file.

A data set of several sizes has shards of its own for each, see `stage1_encode/video_sizes`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

from common.video import FrameSize, parse_frame_size
from stage1_encode.media.csv_table import DELIMITERS, CsvError, CsvReader, CsvRow, FieldSplitter, open_csv

# Accepted column names; if a CSV has several of them, the first counts.
VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS = ("video", "path", "image"), ("prompt", "text"), ("seed",)
SIZE_COLUMN, SHAPE_COLUMNS = "size", ("height", "width")  # read only for a data set of several sizes
SIZE_FIELDS = ("video_size", "has_own_size", "shape")  # of a row
WHOLE_NUMBER = re.compile(r"0*[1-9][0-9]{0,5}(\.0*)?")  # spreadsheets write 720.0
URL_PREFIXES = ("http://", "https://")
DEVICE_FOLDERS = tuple(map(Path, ("/dev", "/dev/fd", "/proc/self/fd")))  # of pipes and standard input
SPECIAL_PATHS = (  # what a path below a folder looks like that was meant for something else, and what to do
    (re.compile(r"/file:/"), "is written as a file:// address; give the path without file://"),
    (
        re.compile(r"/([A-Za-z][A-Za-z0-9+.-]+):/"),
        "is an address, of which only http:// and https:// are read",
    ),
    (re.compile(r"/~[^/]*/"), "begins with ~, which only a shell replaces; give the whole path"),
    (re.compile(r"\$\w+|\$\{|%\w+%"), "names a variable, which only a shell replaces; give the whole path"),
    (re.compile(r"\\"), "is written with backslashes; write / between folders"),
    (re.compile(r"/[A-Za-z]:/"), "begins with the letter of a drive; give the path on this machine"),
)
MAX_SEED_DIGITS = 18  # more may not fit into 64 bits
SHOWN_COLUMNS, SHOWN_CHARACTERS = 12, 40  # of a header in an error


class TooManyFailuresError(RuntimeError):
    """More rows failed than the options allow; what has been encoded is kept."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the CSV."""

    number: int  # index of the row, counted from 0
    line: int  # first line of the row in the file, counted from 1
    path: str  # as written; "" = text only
    prompt: str
    seed: int | None
    problem: str  # why the row cannot be encoded; "" = none known yet
    _: KW_ONLY  # for a data set of several sizes:
    video_size: FrameSize | None = None  # at which it is encoded
    has_own_size: bool = False  # whether the row itself names `video_size`
    shape: tuple[int, int] | None = None  # (height, width) of the source as displayed, if the CSV states it

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
    size: int = -1
    shape: tuple[int, int] = (-1, -1)  # height and width


def rows_folder(csv_path: Path, base_folder: str | None) -> Path:
    """Where a CSV's relative paths start: `base_folder`, else the CSV's folder, or the working one for a pipe."""
    if base_folder is not None:
        return Path(base_folder).absolute()
    folder = csv_path.absolute().parent
    return Path.cwd() if folder in DEVICE_FOLDERS else folder


def locate_file(csv_path: Path, path: str, base_folder: str | None = None) -> str:
    """Path of a row's file, see `rows_folder`; web addresses stay as they are."""
    scheme, separator, rest = path.partition("://")
    address = f"{scheme.lower()}{separator}{rest}"  # FFmpeg knows no HTTP://
    return address if address.startswith(URL_PREFIXES) else str(rows_folder(csv_path, base_folder) / path)


def explain_missing_file(path: str) -> str:
    """Why a file that does not exist cannot be read: what its absolute path was probably meant to be."""
    return next((reason for pattern, reason in SPECIAL_PATHS if pattern.search(path)), "does not exist")


def count_reasons(reasons: Iterable[str], *, shown: int = 5) -> str:
    """Reasons in words with their counts, the most frequent first."""
    counts = Counter(reasons).most_common()
    parts = [f"{count} x {reason}" for reason, count in counts[:shown]]
    return "; ".join(parts + [f"{len(counts) - shown} other reasons"] * (len(counts) > shown))


def rows_digest(rows: Sequence[Row]) -> str:
    """Hex SHA-256 of the fields of rows, stored in the sidecar of their shard."""
    digest = hashlib.sha256()
    for row in rows:
        fields = [value for name, value in asdict(row).items() if name not in SIZE_FIELDS]  # with one size, as ever
        size = [str(row.video_size)] if row.video_size else []
        digest.update(json.dumps(fields + size).encode() + b"\n")
    return digest.hexdigest()


def read_shard_rows(
    csv_path: Path, *, shard_size: int, text_only: bool, stop_after_failures: int = 0
) -> Iterator[list[Row]]:
    """Yield the rows of shard 0, 1, ... of a data set of one size; see `read_csv_rows`."""
    rows = read_csv_rows(csv_path, text_only=text_only, stop_after_failures=stop_after_failures)
    while shard := list(islice(rows, shard_size)):
        yield shard


def read_csv_rows(
    csv_path: Path, *, text_only: bool, stop_after_failures: int = 0, with_sizes: bool = False
) -> Iterator[Row]:
    """The rows of a CSV, read from the file as they are requested, and once; `with_sizes`: with columns of sizes.

    Raises ValueError if the file cannot be read, has no rows or lacks a column, or if its first rows, as many as
    `stop_after_failures` (0 = never), are all wrong.
    """
    rows = _read_rows(csv_path, text_only, with_sizes)
    return check_first_rows(csv_path, rows, stop_after_failures=stop_after_failures)


def check_first_rows(path: Path, rows: Iterator[Row], *, stop_after_failures: int = 0) -> Iterator[Row]:
    """Yield the rows of what `path` names; ValueError if there are none or the first are wrong, see `read_csv_rows`."""
    first = list(islice(rows, max(1, stop_after_failures)))
    if not first:
        raise ValueError(f"data={path}: has no rows")
    if stop_after_failures and all(row.problem for row in first):
        reasons = count_reasons(row.problem for row in first)
        raise ValueError(f"data={path}: line {first[0].line} and all others up to {first[-1].line} fail: {reasons}")
    yield from chain(first, rows)


def _read_rows(csv_path: Path, text_only: bool, with_sizes: bool) -> Iterator[Row]:
    line = 1
    try:
        with open_csv(csv_path) as file:
            reader, number = CsvReader(file), 0
            columns = find_columns(csv_path, reader.read_header(), text_only, with_sizes=with_sizes)
            for row in reader.read_rows(columns.delimiter):
                line = row.line
                if row.problem or any(field.strip() for field in row.fields):  # blank lines are no rows
                    yield _parse_row(number, row, columns, text_only)
                    number += 1
    except OSError as error:
        raise ValueError(f"data={csv_path}: {error.strerror or error}; give the path of a CSV file") from error
    except CsvError as error:
        raise ValueError(f"data={csv_path}: line {line}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data={csv_path}: line {line} or a later one is not {error.encoding}; save it as UTF-8"
        ) from error


def find_columns(csv_path: Path, header: str, text_only: bool, *, with_sizes: bool = False) -> CsvColumns:
    """Find the columns in a header line separated by commas, semicolons or tabs; ValueError if one is missing."""
    if not header.strip():
        raise ValueError(f"data={csv_path}: is empty; needs a header line with columns video and prompt")
    if "\0" in header:
        raise ValueError(f"data={csv_path}: is not text, or UTF-16 without its mark; save it as UTF-8 CSV")
    error = ""
    for delimiter in sorted(DELIMITERS, key=header.count, reverse=True):
        names = _split_header(header, delimiter)
        video, prompt, seed = (
            next((names.index(name) for name in aliases if name in names), -1)
            for aliases in (VIDEO_COLUMNS, PROMPT_COLUMNS, SEED_COLUMNS)
        )
        missing = ["video (or path)"] * (video < 0 and not text_only) + ["prompt (or text)"] * (prompt < 0)
        if not missing:
            own = names if with_sizes else []
            size, height, width = (own.index(name) if name in own else -1 for name in (SIZE_COLUMN, *SHAPE_COLUMNS))
            return CsvColumns(delimiter, len(names), video, prompt, seed, size, (height, width))
        # the most frequent delimiter is the likely one, so the error describes its columns
        error = error or f"data={csv_path}: lacks the column {' and '.join(missing)}; found {_show_columns(names)}"
    raise ValueError(error)


def _split_header(header: str, delimiter: str) -> list[str]:
    """The lower-case names of a header; wrong quotes stay a part of them."""
    text = header.rstrip("\r\n")
    try:
        fields = FieldSplitter(delimiter, spaced=True).split(text)
    except CsvError:
        fields = None
    return [name.strip().lower() for name in (fields or text.split(delimiter))]


def _show_columns(names: Sequence[str]) -> str:
    """The first names of columns, without what a terminal would not show."""
    shown = [name[:SHOWN_CHARACTERS].encode("utf-8", "replace").decode() for name in names[:SHOWN_COLUMNS]]
    text = ", ".join("".join(c if c.isprintable() else "?" for c in name) for name in shown)
    return f"{text}, ..." if len(names) > SHOWN_COLUMNS else text


def _parse_row(number: int, row: CsvRow, columns: CsvColumns, text_only: bool) -> Row:
    texts = [field.encode("utf-8", "replace").decode() for field in row.fields]
    path, prompt, seed = (
        texts[index] if 0 <= index < len(texts) else "" for index in (columns.video, columns.prompt, columns.seed)
    )
    path, digits = path.strip(), seed.strip()
    has_seed = digits.isascii() and digits.isdigit() and len(digits) <= MAX_SEED_DIGITS
    # the wording of a problem is part of `rows_digest`: a change would make finished data sets look changed
    if row.problem:
        problem = row.problem
    elif texts != row.fields:
        problem = "the line is not UTF-8"
    elif len(texts) > columns.count:
        problem = f"{len(texts)} columns where the header has {columns.count}; a prompt with commas needs quotes"
    else:
        problem = _value_problem(path, "" if has_seed else digits, text_only=text_only)
    parsed = Row(number, row.line, path, prompt, int(seed) if has_seed else None, problem)
    return parsed if problem else _add_sizes(parsed, *(_cell(texts, index) for index in (columns.size, *columns.shape)))


def _cell(texts: Sequence[str], index: int) -> str:
    return texts[index].strip() if 0 <= index < len(texts) else ""


def _add_sizes(row: Row, size: str, height: str, width: str) -> Row:
    """A row with what its columns of sizes say, or their problem; empty ones say nothing."""
    if size:
        try:
            return replace(row, video_size=parse_frame_size(size), has_own_size=True)
        except ValueError as error:
            return replace(row, problem=f"size {size[:SHOWN_CHARACTERS]!r}: {error}")
    if not (height or width):
        return row
    if not (WHOLE_NUMBER.fullmatch(height) and WHOLE_NUMBER.fullmatch(width)):
        shown = height[:SHOWN_CHARACTERS], width[:SHOWN_CHARACTERS]
        problem = f"height {shown[0]!r} and width {shown[1]!r} are not two numbers of pixels"
        return replace(row, problem=problem)
    return replace(row, shape=(int(float(height)), int(float(width))))


def _value_problem(path: str, wrong_seed: str, *, text_only: bool) -> str:
    """Why the values of a row cannot be used; "" = they can, as far as the CSV tells."""
    if "\0" in path:  # of a prompt it is cleaned away
        return "the path holds a zero byte"
    if not path and not text_only:
        return "no video given"
    return f"seed {wrong_seed[:SHOWN_CHARACTERS]!r} is not a whole number" if wrong_seed else ""
