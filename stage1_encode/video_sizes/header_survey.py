"""The shape in which each file of a CSV is displayed: a first pass over the files, before any of them is encoded.

`survey.csv` in the folder of the data set holds one line per file, in the order of the rows. Once it is written its
lines stay as they are, since the rows' shards depend on them; rows that the CSV gained are added. Until then
`survey-progress.csv` has what was read, in any order, so that a run that was stopped goes on there.
"""

import csv
import io
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common.files import report_write_errors, write_file
from stage1_encode.config import EncodeConfig
from stage1_encode.media.reader_pool import ReaderPool, default_worker_count
from stage1_encode.media.rows import Row, TooManyFailuresError, count_reasons, locate_file
from stage1_encode.media.video_frame import UnreadableError

log = logging.getLogger(__name__)
SURVEY_FILE, PROGRESS_FILE = "survey.csv", "survey-progress.csv"
COLUMNS = ["row", "path", "height", "width", "problem"]
SECONDS_PER_LINE = 60.0  # of progress
FILES_AHEAD = 8  # per reader process


@dataclass(frozen=True, slots=True)
class SurveyedFile:
    """One line of the survey."""

    row: int  # index of the row, counted from 0
    path: str  # as in the CSV
    shape: tuple[int, int] | None  # (height, width) as displayed; None = cannot be read
    problem: str  # why it cannot

    @property
    def cells(self) -> list[object]:
        """The values of `COLUMNS`."""
        return [self.row, self.path, *(self.shape or ("", "")), self.problem]


def read_survey(path: Path, *, is_complete: bool = True) -> Iterator[SurveyedFile]:
    """Yield the lines of a survey; ValueError if one is damaged, or, if it is not complete, only those before it."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        try:
            if next(lines, None) != COLUMNS:
                raise ValueError("another header")
            for row, name, height, width, problem in lines:
                shape = (int(height), int(width)) if height else None
                if not (problem or (shape and min(shape) > 0)):
                    raise ValueError("neither a size nor a problem")
                yield SurveyedFile(int(row), name, shape, problem)
        except (ValueError, csv.Error) as error:
            if is_complete:
                raise ValueError(
                    f"{path}: line {lines.line_num} is damaged ({error}); delete the file, and the same command reads "
                    "the shapes again"
                ) from error


class HeaderSurvey:
    """Tells the shape of each row's file, reading those that the survey does not have yet. A folder's lock protects it.

    `is_begun`: shards were encoded with the survey, so that a row whose path is another is an error of the CSV.
    """

    def __init__(self, config: EncodeConfig, *, is_begun: bool) -> None:
        self.config, self.folder, self.is_begun = config, Path(config.out), is_begun
        self.stored = read_survey(self.folder / SURVEY_FILE)
        self.next_stored = next(self.stored, None)
        progress = read_survey(self.folder / PROGRESS_FILE, is_complete=False)
        # files that could not be read are tried again until the survey is complete
        self.progress = {item.row: item for item in progress if not item.problem}
        self.readers: ReaderPool | None = None
        self.added: list[SurveyedFile] = []
        self.file: TextIO | None = None
        self.count, self.last_line_time = 0, time.monotonic()

    def add_shapes(self, rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[int, int] | None]]:
        """Yield each row with the shape of its file; None if it needs none, has none or cannot be read.

        Raises `TooManyFailuresError` at the end, before the survey is kept, if too many files cannot be read.
        """
        pending: deque[tuple[Row, SurveyedFile | Future[tuple[int, int]] | None]] = deque()
        workers = self.config.workers or default_worker_count()
        try:
            for row in rows:
                self.count += 1
                pending.append((row, self._look_up(row) if needs_survey(row) else None))
                if len(pending) > FILES_AHEAD * workers:
                    yield self._complete(*pending.popleft())
            while pending:
                yield self._complete(*pending.popleft())
            self._keep()
        finally:
            self.close()

    def _look_up(self, row: Row) -> SurveyedFile | Future[tuple[int, int]]:
        """What is known of a row's file, or its shape as it is being read."""
        while self.next_stored is not None and self.next_stored.row < row.number:
            self.next_stored = next(self.stored, None)
        known = self.next_stored
        if known is not None and known.row == row.number:
            if known.path == row.path:
                return known
            if self.is_begun:
                raise ValueError(
                    f"data={self.config.data}: line {row.line} names {row.path}, and {self.folder} was begun with "
                    f"{known.path} there; rows may only be added at the end: undo the change or give a new folder"
                )
        known = self.progress.get(row.number)
        if known is not None and known.path == row.path:
            self.added.append(known)
            return known
        if self.readers is None:
            log.info("encode: the shape of each file is read first, and kept in %s", self.folder / SURVEY_FILE)
            self.readers = ReaderPool(
                self.config.workers or default_worker_count(), self.config.spec, self.config.read_timeout
            )
        return self.readers.submit_shape(locate_file(Path(self.config.data), row.path, self.config.base_folder))

    def _complete(
        self, row: Row, found: SurveyedFile | Future[tuple[int, int]] | None
    ) -> tuple[Row, tuple[int, int] | None]:
        """A row and its shape, which is noted in the file of progress if it was read."""
        if isinstance(found, Future):
            try:
                found = SurveyedFile(row.number, row.path, found.result(), "")
            except UnreadableError as error:
                found = SurveyedFile(row.number, row.path, None, str(error))
            self._note(found)
        return row, found.shape if found else None

    def _note(self, item: SurveyedFile) -> None:
        self.added.append(item)
        limit = self.config.stop_after_failures
        if limit and len(self.added) == limit and all(one.problem for one in self.added):
            self._refuse(limit, limit)
        with report_write_errors(self.folder):
            if self.file is None:
                path = self.folder / PROGRESS_FILE
                write_file(path, format_survey(self.progress.values()))  # without the torn line of a killed run
                self.file = path.open("a", encoding="utf-8", newline="")
            csv.writer(self.file, lineterminator="\n").writerow(item.cells)
            self.file.flush()
        if time.monotonic() - self.last_line_time >= SECONDS_PER_LINE:
            self.last_line_time = time.monotonic()
            log.info("survey: %d files read", len(self.added))

    def _keep(self) -> None:
        """Write the survey, unless nothing was added to it."""
        if self.added:
            failures = sum(bool(item.problem) for item in self.added)
            if failures > self.config.max_failure_rate * self.count:
                self._refuse(failures, self.count)
            known = {item.row: item for item in (*read_survey(self.folder / SURVEY_FILE), *self.added)}
            with report_write_errors(self.folder):
                write_file(self.folder / SURVEY_FILE, format_survey(known[row] for row in sorted(known)))
        (self.folder / PROGRESS_FILE).unlink(missing_ok=True)

    def _refuse(self, failures: int, count: int) -> None:
        """Raise `TooManyFailuresError`: what is encoded now could not get another size when its files appear."""
        reasons = count_reasons(item.problem for item in self.added if item.problem)
        raise TooManyFailuresError(
            f"{failures} of {count} files cannot be read, so that their sizes are unknown: {reasons}; correct the CSV "
            "or --base-folder and rerun the same command, or go on without them with a higher --max-failure-rate and "
            "--stop-after-failures 0"
        )

    def close(self) -> None:
        """End the processes that read files."""
        if self.readers is not None:
            self.readers.close()
        if self.file is not None:
            self.file.close()


def needs_survey(row: Row) -> bool:
    """Whether a row's size depends on what its file holds."""
    return bool(row.path) and not (row.problem or row.has_own_size or row.shape)


def format_survey(items: Iterable[SurveyedFile]) -> bytes:
    """The bytes of a survey."""
    with closing(io.StringIO()) as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(item.cells for item in items)
        return text.getvalue().encode()
