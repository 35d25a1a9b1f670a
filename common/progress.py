"""Progress of long work: on a terminal a bar with rate and remaining time, elsewhere plain lines."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_PER_LINE = 60.0  # between two plain lines, so that the log of a long run stays short
PLAIN_LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"  # as tqdm names them


class ProgressBar:
    """Counts from `initial` to `total`. Writes to stderr, or nothing if `quiet`."""

    def __init__(self, total: int, *, label: str, initial: int = 0, quiet: bool = False) -> None:
        self.plain_text = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=initial, desc=label, disable=quiet or self.plain_text, dynamic_ncols=True)
        self.total, self.label, self.completed, self.initial = total, label, initial, initial
        self.start_time = self.last_line_time = time.monotonic()
        self.last_line_count, self.note = initial, ""  # of the last plain line; after the figures

    def advance(self, note: str = "", *, count: int = 1) -> None:
        """Count `count` more items; `note` is shown after the figures."""
        self.completed += count
        self.note = note
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        is_due = time.monotonic() - self.last_line_time >= SECONDS_PER_LINE or self.completed >= self.total
        if self.plain_text and is_due:
            self._write_line()

    def _write_line(self) -> None:
        self.last_line_time, self.last_line_count = time.monotonic(), self.completed
        line = tqdm.format_meter(
            self.completed,
            self.total,
            self.last_line_time - self.start_time,
            prefix=self.label,
            postfix=self.note,
            initial=self.initial,  # what an earlier process completed took none of this one's time
            bar_format=PLAIN_LINE,
        )
        sys.stderr.write(f"{line}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.plain_text and self.last_line_count != self.completed:  # stopped before the end
            self._write_line()


def track_progress(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """Yield `items`, each counted when the consumer asks for the next."""
    with ProgressBar(total, label=label) as progress:
        for item in items:
            yield item
            progress.advance()
