"""Stops training cleanly on a signal: the iteration ends, and all ranks learn of a signal to one of them."""

import logging
import signal
import time
from types import FrameType
from typing import Self

from stage2_distill.distributed.process_group import on_any_rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last is SLURM's usual warning
REPEAT_SECONDS = 5.0  # a second signal within this time is the first again: torchrun forwards what a rank has received


class StopSignal:
    """Context in which a signal requests a stop; another one more than REPEAT_SECONDS later ends the process."""

    def __init__(self) -> None:
        self.first_signal_time: float | None = None

    def is_requested(self) -> bool:
        """Whether any rank has received a signal; all ranks call it after each iteration and get the same answer."""
        return on_any_rank(self.first_signal_time is not None)

    def __enter__(self) -> Self:
        # an ignored one stays ignored: under nohup the run outlives its terminal
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous_handlers = {number: signal.signal(number, self._handle_signal) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first_signal_time is None:
            self.first_signal_time = now
            logging.info("%s: ending after this iteration, with a checkpoint", signal.Signals(number).name)
        elif now - self.first_signal_time > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)  # the default action ends the process
            signal.raise_signal(number)
