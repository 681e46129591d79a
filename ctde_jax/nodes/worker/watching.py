"""Ends a worker while it computes: on SIGTERM, without its files, or without its parent."""

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PERIOD_SECONDS = 1.0

# Not the number of any signal.
_STOP = 0


@contextmanager
def watching(
    parent: int | None, check: Callable[[], str], end: Callable[[str], None]
) -> Iterator[None]:
    """Watches this process from a thread during the body, in the main thread.

    A signal handler of Python would run only after the current call of JAX, perhaps minutes later.

    Args:
        parent: Process whose end is watched (default: none).
        check: Called every second; returns the reason to end, or "".
        end: Called in the thread, with the reason; ends this process.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    # Signals with a handler in Python write their number to the socket at once.
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    descriptor = signal.set_wakeup_fd(sender.fileno())
    thread = threading.Thread(
        target=_watch, args=(receiver, parent, check, end), name="watching", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, handler)
        sender.send(bytes([_STOP]))
        thread.join()
        receiver.close()
        sender.close()


def _watch(
    receiver: socket.socket,
    parent: int | None,
    check: Callable[[], str],
    end: Callable[[str], None],
) -> None:
    has_ended = _observed(parent)
    numbers = b""
    while _STOP not in numbers:
        if signal.SIGTERM in numbers:
            end("SIGTERM")
        elif has_ended():
            end(f"its parent, process {parent}, has ended")
        elif reason := check():
            end(reason)
        is_ready, _, _ = select.select([receiver], [], [], _PERIOD_SECONDS)
        numbers = receiver.recv(64) if is_ready else b""


def _observed(process: int | None) -> Callable[[], bool]:
    """Returns a function that returns whether a process has ended."""
    if process is None:
        return lambda: False

    # A file descriptor of the process stays valid if the number is used again, and shows the end of
    # a process whose status nobody has read.
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            return lambda: True
        except OSError:
            pass  # an old kernel, or a sandbox without it
        else:
            return lambda: bool(select.select([handle], [], [], 0)[0])

    def is_missing() -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # a process of another user
        return False

    return is_missing
