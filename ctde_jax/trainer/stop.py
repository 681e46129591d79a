"""Handlers of Ctrl-C, SIGTERM and SIGHUP, which end a training after the current dispatch."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ctde_jax.devices import hosts


class Stop:
    """The signal that has asked a run to stop, if any; it is true if there is one.

    A callback that stops the run is recorded as SIGINT. Several hosts agree on the signal, so that
    they stop after the same dispatch.
    """

    def __init__(self):
        self.asked_by: signal.Signals | None = None
        self._noted: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.asked_by is not None

    def note(self, asked_by: signal.Signals) -> bool:
        """Records a signal that this host received; returns whether it is the first."""
        is_first = self._noted is None
        self._noted = self._noted or asked_by
        # On several hosts, a signal takes effect only once they have agreed on it.
        if hosts.count() == 1:
            self.asked_by = self._noted
        return is_first

    def agree(self) -> None:
        """Sets `asked_by` on all hosts if any of them has received a signal.

        All hosts must call this after the same dispatch.
        """
        # Signal numbers are positive, so the largest is a signal if any host received one.
        number = hosts.largest(self._noted or 0)
        self.asked_by = signal.Signals(number) if number else None

    @property
    def is_preemption(self) -> bool:
        """Whether the signal is SIGTERM, as from a scheduler, or SIGHUP."""
        return self.asked_by in (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred(saves: bool) -> Iterator[Stop]:
    """Yields a `Stop` that records signals within the body, which then do not end the process.

    After the first signal, Ctrl-C raises KeyboardInterrupt. In a thread other than the main one,
    signals are not recorded.

    Args:
        saves: Whether the run writes checkpoints. If not, only Ctrl-C is handled, so SIGTERM and
            SIGHUP end the process immediately. An ignored SIGHUP, as under nohup, stays ignored.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if not stop.note(signal.Signals(number)) and number == signal.SIGINT:
            raise KeyboardInterrupt

    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    # Restore the handlers at the end; None stands for a handler that was not set from Python, such
    # as that of JAX on several hosts.
    numbers = [signal.SIGINT, signal.SIGTERM] if saves else [signal.SIGINT]
    if saves and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
