"""Stopping in good order: SIGTERM and SIGINT let the iteration end, and all ranks learn of a signal that one got."""

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from stage2_distill.distributed.process_group import on_any_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT)


REPEAT_SECONDS = 5.0  # seconds in which a second signal means the first: torchrun passes on what a rank has got already


class StopSignal:
    """Watches for a signal to end; another one some seconds later ends the process at once."""

    def __init__(self) -> None:
        self.first_signal_time: float | None = None
        self.previous_handlers: dict[signal.Signals, signal.Handlers] = {}

    def is_requested(self) -> bool:
        """Whether any rank was told to end; all ranks call it after each iteration and get one answer."""
        return on_any_rank(self.first_signal_time is not None)

    def __enter__(self) -> Self:
        self.previous_handlers = {number: signal.signal(number, self._handle_signal) for number in SIGNALS}  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first_signal_time is None:
            self.first_signal_time = now
            logging.info("%s: ending after this iteration, with a checkpoint", signal.Signals(number).name)
        elif now - self.first_signal_time > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
