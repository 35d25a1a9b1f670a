"""Stopping in good order: SIGTERM and SIGINT let the iteration end, and all ranks learn of a signal that one got."""

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from stage2_distill.distributed.process_group import on_any_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)


PATIENCE = 5.0  # seconds in which a second signal means the first: torchrun passes on what a rank has got already


class Stop:
    """Watches for a signal to end; another one some seconds later ends the process at once."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.before: dict[signal.Signals, signal.Handlers] = {}

    def wanted(self) -> bool:
        """Whether any rank was told to end; all ranks call it after each iteration and get one answer."""
        return on_any_rank(self.since is not None)

    def __enter__(self) -> Self:
        self.before = {each: signal.signal(each, self._note) for each in SIGNALS}  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
            logging.info("%s: ending after this iteration, with a checkpoint", signal.Signals(number).name)
        elif now - self.since > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
