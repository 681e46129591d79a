"""The thread that uploads the checkpoints of a run to its mirror during the run."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ctde_jax.checkpoint.mirror import Mirror, Unavailable, warn

_SECONDS_BETWEEN_TRIES = 10.0
_SECONDS_BETWEEN_WARNINGS = 600.0
_SECONDS_AT_END = 300.0
"""Maximum time that the end of a run waits for the last upload."""


class _Job(NamedTuple):
    newest: Path
    best: Path | None


class Uploader:
    """Uploads checkpoints in a thread, one at a time; made by `open_uploader`.

    If a checkpoint is offered during an upload, it is uploaded next; a checkpoint that is waiting
    is then left out, so a slow store receives fewer checkpoints. A failed upload is tried again
    until it succeeds or a newer checkpoint is offered.
    """

    def __init__(self, mirror: Mirror, keep: int):
        self._mirror = mirror
        self._keep = keep
        self._changed = threading.Condition()
        self._next: _Job | None = None
        self._current: _Job | None = None
        self._uploaded: Path | None = None
        self._failure: Unavailable | None = None
        self._last_warning = -_SECONDS_BETWEEN_WARNINGS
        # A daemon thread, because a store may not answer when the process should end.
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, newest: Path, best: Path | None) -> set[Path]:
        """Uploads the newest and the best checkpoint after those that are being uploaded.

        Returns:
            The paths of all these checkpoints, which must exist until the next call.
        """
        with self._changed:
            self._next = _Job(newest, best)
            self._changed.notify_all()
            jobs = [self._next] if self._current is None else [self._next, self._current]
        return {path for job in jobs for path in job if path is not None}

    def close(self, seconds: float, say: Callable[[str], None]) -> None:
        """Waits for the last upload, at most this time, and ends the thread."""
        try:
            with self._changed:
                # Most uploads end at once, without a message.
                if not self._changed.wait_for(self._is_idle, min(seconds, 1)) and seconds:
                    say(f"mirror     waiting at most {seconds:.0f} s for the last upload")
                    self._changed.wait_for(self._is_idle, seconds)
                missing = self._next or self._current
        finally:
            self._mirror.is_closed.set()
            with self._changed:
                self._changed.notify_all()
        if missing is not None:
            reason = self._failure or "its upload has not ended"
            warn(
                f"{self._mirror.address} does not have {missing.newest.name} of this run yet, as "
                f"{reason}; the same command uploads it"
            )
        elif self._uploaded is not None:
            say(f"mirror     {self._uploaded.name} is in {self._mirror.address}")

    def _is_idle(self) -> bool:
        return self._next is None and self._current is None

    def _work(self) -> None:
        while (job := self._take()) is not None:
            try:
                self._mirror.upload(job.newest, job.best, self._keep)
            except Unavailable as error:
                self._report(error)
                self._put_back(job)
            else:
                with self._changed:
                    self._uploaded = job.newest
                    self._failure = None
                    self._current = None
                    self._changed.notify_all()

    def _take(self) -> _Job | None:
        """Waits for the next upload; returns None when the thread must end."""
        is_closed = self._mirror.is_closed.is_set
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or is_closed())
            if is_closed():
                return None
            self._current = self._next
            self._next = None
            return self._current

    def _put_back(self, job: _Job) -> None:
        """Makes a failed upload the next one, unless there is a newer one, and waits."""
        with self._changed:
            self._next = self._next or job
            self._current = None
        self._mirror.is_closed.wait(_SECONDS_BETWEEN_TRIES)

    def _report(self, error: Unavailable) -> None:
        self._failure = error
        now = time.monotonic()
        if self._mirror.is_closed.is_set() or now - self._last_warning < _SECONDS_BETWEEN_WARNINGS:
            return
        self._last_warning = now
        warn(f"{error}; training continues, and the upload is tried again")


@contextmanager
def open_uploader(
    mirror: Mirror | None, keep: int, say: Callable[[str], None]
) -> Iterator[Uploader | None]:
    """Starts the thread that uploads checkpoints, and waits for the last upload on exit.

    It waits at most `_SECONDS_AT_END`, and not at all after KeyboardInterrupt.

    Args:
        mirror: The mirror of the run; if None, yields None.
        keep: Number of newest checkpoints to keep in the mirror.
        say: Prints a line.
    """
    if mirror is None:
        yield None
        return
    uploader = Uploader(mirror, keep)
    seconds = 0.0
    try:
        yield uploader
        seconds = _SECONDS_AT_END
    except Exception:
        seconds = _SECONDS_AT_END
        raise
    finally:
        uploader.close(seconds, say)
