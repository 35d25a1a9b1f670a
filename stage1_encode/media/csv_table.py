"""CSV file -> rows of fields. A wrong quote fails its line alone, while Python's csv module would give up.

Fields follow RFC 4180; besides, spaces may stand around a quoted field where it is otherwise sound.
"""

import io
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

DELIMITERS = ",;\t"
MAX_ROW_CHARACTERS = 1 << 24  # of a row with all its lines; more is no CSV, or a quote that is left open
QUOTE_PROBLEM = 'is a quote left open? inside quotes, write "" for a quote and not \\"'
ENCODINGS = {  # by the bytes at the start; utf-32 first, as its mark begins like that of utf-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
QUOTED_FIELD = r'{spaces}"([^"]*+(?:""[^"]*+)*+)" *+(?={delimiter}|\Z)'  # possessive: long fields are scanned once
OPEN_FIELD = r'{spaces}"[^"]*+(?:""[^"]*+)*+\Z'


class CsvError(ValueError):
    """A text is no CSV; the message is the reason."""


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One row of a CSV."""

    line: int  # its first line in the file, counted from 1
    fields: list[str]
    problem: str = ""  # why the fields are unknown; "" = they are known


class FieldSplitter:
    """Splits the text of a row at a delimiter; `spaced` allows spaces before a quote, else a part of a text."""

    def __init__(self, delimiter: str, *, spaced: bool) -> None:
        facts = {"delimiter": re.escape(delimiter), "spaces": " *+" if spaced else ""}
        self.delimiter = delimiter
        self.quoted = re.compile(QUOTED_FIELD.format(**facts))
        self.open = re.compile(OPEN_FIELD.format(**facts))

    def split(self, text: str) -> list[str] | None:
        """The fields of a row without its line end; None = a quote is open. CsvError if a quote is wrong."""
        fields, position = list[str](), 0
        while True:
            if match := self.quoted.match(text, position):
                end = match.end()
                fields.append(match[1].replace('""', '"'))
            elif self.open.match(text, position):
                return None
            elif text.startswith('"', position):
                raise CsvError(QUOTE_PROBLEM)
            else:
                end = text.find(self.delimiter, position)
                end = len(text) if end < 0 else end
                fields.append(text[position:end])
            if end == len(text):
                return fields
            position = end + 1


class CsvReader:
    """Reads the header line, then the rows, of a text file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.line_number = file, 0  # of the last line that belongs to a row
        self.pending: deque[str] = deque()  # lines that were read ahead while a quote was open

    def read_header(self) -> str:
        """The first line that is not blank, with those that its quotes reach over; "" at the end of the file."""
        header = ""
        while not header.strip() or header.count('"') % 2:
            line = self._next_line()
            if not line:
                break
            header = header + line if header.strip() else line
        return header

    def read_rows(self, delimiter: str) -> Iterator[CsvRow]:
        """Yield the remaining rows, blank lines included."""
        splitters = [FieldSplitter(delimiter, spaced=spaced) for spaced in (True, False)]
        while text := self._next_line():
            line, fields = self.line_number, None
            if '"' not in text:
                fields = _strip_line_end(text).split(delimiter)
            for splitter in splitters if fields is None else ():
                fields = fields or self._complete_row(splitter, text)
            yield CsvRow(line, fields or [], "" if fields else QUOTE_PROBLEM)

    def _complete_row(self, splitter: FieldSplitter, text: str) -> list[str] | None:
        """Split a row, which may span further lines; None if a quote is wrong, and then only its line is used up."""
        count = 0  # of further lines
        while True:
            try:
                fields = splitter.split(_strip_line_end(text))
            except CsvError:
                return None
            if fields is not None:
                for _ in range(count):
                    self._next_line()
                return fields
            further = self._lines_to_close(count, MAX_ROW_CHARACTERS - len(text))
            if not further:  # the end of the file, or too far
                return None
            count += len(further)
            text += "".join(further)

    def _lines_to_close(self, start: int, max_characters: int) -> list[str]:
        """Pending lines from `start` on up to the first with a single quote, which ends an open field; [] = none."""
        lines, size = list[str](), 0
        for line in self._lines_ahead(start):
            lines.append(line)
            size += len(line)
            if '"' in line.replace('""', ""):  # a doubled quote is a part of the text
                return lines
            if size > max_characters:
                break
        return []

    def _lines_ahead(self, start: int) -> Iterator[str]:
        """Pending lines from `start` on, then further ones of the file, which become pending."""
        yield from islice(self.pending, start, None)
        while line := self._read_line():
            self.pending.append(line)
            yield line

    def _next_line(self) -> str:
        self.line_number += 1
        return self.pending.popleft() if self.pending else self._read_line()

    def _read_line(self) -> str:
        line = self.file.readline(MAX_ROW_CHARACTERS)
        if len(line) == MAX_ROW_CHARACTERS:
            raise CsvError(f"has a line of more than {MAX_ROW_CHARACTERS >> 20} million characters; give a CSV")
        return line


def _strip_line_end(text: str) -> str:
    return text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith(("\n", "\r")) else text


def open_csv(path: Path) -> TextIO:
    """Open a file or pipe as text: UTF-8, or UTF-16 and UTF-32 with a byte order mark. OSError if it cannot be read."""
    file = path.open("rb")
    start = file.peek(4)[:4]  # a pipe cannot be read twice
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8-sig")
    # surrogateescape keeps bytes that are not UTF-8, so that only their own row fails
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
