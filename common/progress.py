"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE_SECONDS = 5.0  # between two plain lines


class Progress:
    """Counts up to `total`; `done` of it was there before. Writes to stderr, or nothing where `quiet`."""

    def __init__(self, total: int, *, label: str, done: int = 0, quiet: bool = False) -> None:
        self.plain = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=label, disable=quiet or self.plain, dynamic_ncols=True)
        self.total, self.label, self.done, self.first = total, label, done, done
        self.began = self.spoke = time.monotonic()

    def advance(self, note: str = "", *, count: int = 1) -> None:
        """Say that `count` more are done; `note` is shown behind the figures."""
        self.done += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.plain and (now - self.spoke >= LINE_SECONDS or self.done >= self.total):
            self.spoke = now
            rate = (self.done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            text = f"{self.label}: {self.done}/{self.total}, {rate:.3g}/s, {left:.0f} s left"
            sys.stderr.write(f"{text}, {note}\n" if note else f"{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def track(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """Yield `items` and count them."""
    with Progress(total, label=label) as progress:
        for item in items:
            yield item
            progress.advance()
