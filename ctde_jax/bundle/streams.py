"""Standard streams of a command, which may be closed, full, or unable to encode a character."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

_OF_STREAMS = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""Error numbers of failed writes to standard output."""


def run(main: Callable[[Sequence[str]], int]) -> int:
    """Runs a command with the arguments of this process and returns its exit status.

    Returns:
        The status of the command if it is not 0. Otherwise 1 if the reader of standard output, such
        as `head`, has exited; 2, with one sentence on standard error, if standard output is not
        writable or the working directory is not usable.
    """
    _prepare()

    # A deleted working directory cannot be used, since no relative path can be resolved in it.
    try:
        os.getcwd()
    except OSError as error:
        print(
            f"error: the working directory is not usable ({error.strerror}); use another one.",
            file=sys.stderr,
        )
        return 2

    # Flush here, so that a failure is noticed in this function. Errors of files have a file name.
    status = 0
    try:
        status = _exit_status(main)
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_STREAMS:
            raise
        discard_output()
        if isinstance(error, BrokenPipeError):
            return status or 1
        if not status:
            print(f"error: standard output is not writable: {error.strerror}.", file=sys.stderr)
        return status or 2
    return status


def discard_output() -> None:
    """Redirects standard output to the null device, including buffered output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Screen:
    """Wraps standard output, so that a failed write does not end the training.

    The first failure, such as a full disk or a closed terminal, is reported on standard error in
    one sentence; later output is dropped. Characters that the encoding lacks are replaced by
    question marks.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it after a failure; returns its length in both cases."""
        if not self._is_lost:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            try:
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, unless it has failed."""
        if not self._is_lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        # Python flushes standard output at exit, which would fail again.
        self._is_lost = True
        if self._stream is sys.__stdout__:
            discard_output()
        with suppress(OSError):  # standard error may be gone, too
            reason = error.strerror or error
            print(
                f"Standard output is not writable ({reason}); further output is dropped.",
                file=sys.stderr,
            )


def _exit_status(main: Callable[[Sequence[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    # argparse exits after --help, before standard output is flushed.
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _prepare() -> None:
    """Opens the null device for closed streams, and escapes characters that an encoding lacks."""
    # A file of the run would otherwise take the descriptor of a closed stream.
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            # Open for the life of the process.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
