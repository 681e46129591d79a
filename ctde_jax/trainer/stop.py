"""Ctrl-C, SIGTERM and SIGHUP end a training after the dispatch at hand, not in the middle of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ctde_jax.devices import hosts


class Stop:
    """Which signal has asked for the end, if any; of several hosts, all end where they have agreed to."""

    def __init__(self):
        self.asked_by: signal.Signals | None = None
        self._noted: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.asked_by is not None

    def note(self, asked_by: signal.Signals) -> bool:
        """Takes note of a signal of this host; returns whether it is the first."""
        is_first, self._noted = self._noted is None, self._noted or asked_by
        if hosts.count() == 1:
            self.asked_by = self._noted
        return is_first

    def agree(self) -> None:
        """Makes the signal of any host that of all, which must all call this after the same dispatch."""
        number = hosts.largest(self._noted or 0)
        self.asked_by = signal.Signals(number) if number else None

    @property
    def is_preemption(self) -> bool:
        """Whether somebody else wants the machine."""
        return self.asked_by in (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred(saves: bool) -> Iterator[Stop]:
    """Lets a first signal be noted only; Ctrl-C after it ends at once.

    Args:
        saves: Whether there are checkpoints. Without them SIGTERM and SIGHUP end the process at once; a SIGHUP that is
            ignored, as under nohup, stays ignored.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if not stop.note(signal.Signals(number)) and number == signal.SIGINT:
            raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers signals to the main thread only
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM] if saves else [signal.SIGINT]
    if saves and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(
                number, signal.SIG_DFL if handler is None else handler
            )  # None: JAX's, for several hosts
