"""Passes requests to the worker of a node, which is started if there is none.

The asking process lives for one message, so this module imports neither JAX nor numpy.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ctde_jax.errors import (
    InputError,
    check_positive,
    on_one_line,
    quoted,
    shortened,
    writing_to,
)
from ctde_jax.nodes.worker import files, frames

# Number of times that a request is sent if workers end before they answer.
_ATTEMPTS = 3

_POLL_SECONDS = 0.02

# While a killed process ends, its connections may be closed earlier than its socket.
_PAUSE_SECONDS = 0.1


class WorkerFailed(RuntimeError):
    """Raised with one sentence if a worker could not start, ended repeatedly, or did not answer."""


def ask(
    folder: Path | str, command: Sequence[str], request: bytes, timeout: float = 3600.0
) -> bytes:
    """Returns the answer of the worker of a folder, which is started if there is none.

    The worker stays when this process ends. Its output is appended to `worker.log` in the folder.
    If a worker is killed before it has answered, another is started and asked again, so requests
    must be idempotent.

    Args:
        folder: Folder of the node; created if necessary, and made private (mode 0700).
        command: Arguments of the process that calls `serve` for the folder; the first is the path
            of a program.
        request: Any bytes, at most 2 GiB.
        timeout: Seconds for everything, including the start of a worker.

    Raises:
        InputError: If the request is too long, or the folder cannot be written to.
        WorkerFailed: With the worker's sentence, if it could not answer; if it ended at its start,
            or in each of three attempts; or at the timeout.
    """
    check_positive(timeout=timeout)
    if len(request) > frames.MOST_BYTES:
        raise InputError(
            "request", f"must have at most {frames.MOST_BYTES:,} bytes, got {len(request):,}."
        )
    folder = Path(folder).expanduser().resolve()
    deadline = time.monotonic() + timeout

    try:
        for _ in range(_ATTEMPTS):
            try:
                with _connect(folder, command, deadline) as connection:
                    frames.send(connection, frames.REQUEST, request, deadline)
                    replies = frames.ANSWER + frames.ERROR
                    kind, content = frames.receive(connection, replies, deadline)
            except ConnectionError:
                time.sleep(_PAUSE_SECONDS)
                continue
            if kind == frames.ERROR:
                raise WorkerFailed(content.decode(errors="replace"))
            return content
    except TimeoutError as error:
        raise WorkerFailed(
            f"the worker in {folder} did not answer within {timeout:g} seconds; see {files.LOG}."
        ) from error
    except frames.WrongFrame as error:
        raise WorkerFailed(f"the worker in {folder} sent a wrong frame: {error}") from error
    raise WorkerFailed(
        f"the worker in {folder} ended before it answered, {_ATTEMPTS} times in a row; "
        f"{files.LOG} ends with: {_last_line(folder)}"
    )


def _connect(folder: Path, command: Sequence[str], deadline: float) -> socket.socket:
    """Connects to the worker of a folder, and starts one if none runs or starts.

    Raises:
        ConnectionError: If a signal ended the worker at its start, which may be repeated.
        TimeoutError: If no worker listens at the deadline.
        WorkerFailed: If the worker ended at its start by itself, or the command cannot be run.
    """
    process = None
    begin = 0
    while True:
        # An ended process is only a failure if no connection was possible after its end.
        status = None if process is None else process.poll()
        connection = _try_to_connect(folder)
        if connection is not None:
            return connection
        if status is not None and status < 0:
            raise ConnectionAbortedError(f"signal {-status} ended the worker")
        if status is not None:
            raise WorkerFailed(
                f"the worker in {folder} ended at its start with status {status}: "
                f"{_last_line(folder, begin)}"
            )

        # The lock is free if no worker runs or starts. A worker that ends has the lock until it has
        # removed its socket.
        if process is None:
            with writing_to(folder, "folder"):
                files.make_private(folder)
                lock = files.lock(folder)
            if lock is not None:
                process, begin = _start(folder, command, lock)
        if time.monotonic() > deadline:
            raise TimeoutError("no worker listens at the deadline")
        time.sleep(_POLL_SECONDS)


def _try_to_connect(folder: Path) -> socket.socket | None:
    place = files.address(folder)
    if place is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(str(place))
        if frames.is_same_user(connection):
            return connection
    # No worker listens, or its queue is full.
    except (FileNotFoundError, ConnectionError, BlockingIOError):
        pass
    connection.close()
    return None


def _start(folder: Path, command: Sequence[str], lock: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a worker with the lock, in a session that outlives this process.

    Returns:
        The process, and the size of the log before its start, in bytes.
    """
    try:
        with writing_to(folder, "folder"):
            log = files.open_log(folder)
        with log:
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, files.LOCK_VARIABLE: str(lock)},
                pass_fds=[lock],
                start_new_session=True,
            )
    except OSError as error:
        raise WorkerFailed(
            f"the worker cannot be started with {quoted(command[0])}: {error.strerror}."
        ) from error
    finally:
        os.close(lock)
    # The status of the worker is read when it ends, in case this process lives longer.
    threading.Thread(target=process.wait, name="worker", daemon=True).start()
    return process, begin


def _last_line(folder: Path, begin: int = 0) -> str:
    """Returns the last line of the log after a position, shortened."""
    try:
        with (folder / files.LOG).open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(min(begin, end), end - 4096))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError as error:
        return f"{files.LOG} cannot be read ({error.strerror})."
    written = [line.strip() for line in lines if line.strip()]
    return shortened(on_one_line(written[-1])) if written else f"{files.LOG} has no line."
