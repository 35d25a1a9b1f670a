"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_PER_LINE = 5.0  # between two plain lines


class ProgressBar:
    """Counts up to `total`; `done` of it was there before. Writes to stderr, or nothing where `quiet`."""

    def __init__(self, total: int, *, label: str, initial: int = 0, quiet: bool = False) -> None:
        self.plain_text = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=initial, desc=label, disable=quiet or self.plain_text, dynamic_ncols=True)
        self.total, self.label, self.completed, self.initial = total, label, initial, initial
        self.start_time = self.last_line_time = time.monotonic()

    def advance(self, note: str = "", *, count: int = 1) -> None:
        """Say that `count` more are done; `note` is shown behind the figures."""
        self.completed += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.plain_text and (now - self.last_line_time >= SECONDS_PER_LINE or self.completed >= self.total):
            self.last_line_time = now
            rate = (self.completed - self.initial) / max(now - self.start_time, 1e-9)
            seconds_left = (self.total - self.completed) / max(rate, 1e-9)
            text = f"{self.label}: {self.completed}/{self.total}, {rate:.3g}/s, {seconds_left:.0f} s left"
            sys.stderr.write(f"{text}, {note}\n" if note else f"{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def track_progress(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """Yield `items` and count them."""
    with ProgressBar(total, label=label) as progress:
        for item in items:
            yield item
            progress.advance()
