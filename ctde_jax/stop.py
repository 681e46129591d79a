"""Ctrl-C and SIGTERM end a training after the dispatch at hand, not in the middle of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Which signal has asked for the end, if any."""

    def __init__(self):
        self.asked_by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.asked_by is not None

    @property
    def is_preemption(self) -> bool:
        """Whether somebody else wants the machine."""
        return self.asked_by is signal.SIGTERM


@contextmanager
def deferred(saves: bool) -> Iterator[Stop]:
    """Lets a first signal be noted only; Ctrl-C after it ends at once.

    Args:
        saves: Whether there are checkpoints; without them SIGTERM ends the process as ever.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop:
            raise KeyboardInterrupt
        stop.asked_by = stop.asked_by or signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM] if saves else [signal.SIGINT]
    previous = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
