"""The loop of a worker: requests of opaque bytes from this user's processes, one at a time."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from ctde_jax.errors import InputError, check_positive, on_one_line, shortened, writing_to
from ctde_jax.nodes.worker import files, frames
from ctde_jax.nodes.worker.watching import watching

# Time for a request to arrive and for an answer to be taken, once a process has connected.
_TRANSFER_SECONDS = 60.0


def serve(
    folder: Path | str,
    answer: Callable[[bytes], bytes],
    idle_seconds: float = 3600.0,
    parent: int | None = None,
) -> None:
    """Answers the requests of `ask`, one at a time, until none has come for `idle_seconds`.

    It must be called in the main thread, because it handles SIGTERM. If `answer` raises, `ask`
    raises the error's sentence, and the loop continues. A request may come more than once, because
    `ask` repeats it after a worker has been killed.

    The process ends at once, even within `answer`, on SIGTERM, if `parent` has ended, or if the
    folder or the worker's files in it are removed.

    Args:
        folder: Folder of the node; created if necessary, and made private (mode 0700).
        answer: Function from a request to its answer.
        idle_seconds: Seconds without a request after which the function returns.
        parent: Process without which the worker ends, such as the main process of the node.

    Raises:
        InputError: If the folder has another worker or cannot be written to.
    """
    check_positive(idle_seconds=idle_seconds)
    folder = Path(folder).expanduser().resolve()

    # Lock the folder, unless `ask` has locked it, and listen.
    with writing_to(folder, "folder"):
        files.make_private(folder)
        inherited = files.inherited_lock(folder)
        lock = files.lock(folder) if inherited is None else inherited
        if lock is None:
            raise InputError(
                "folder",
                f"must have one worker only, but another process serves {shortened(str(folder))}; "
                "end it, or choose another folder.",
            )
        listener = files.listen(folder)
    place = Path(listener.getsockname())

    def check() -> str:
        files.limit_log(folder)
        return "" if _is_current(lock, folder, place) else f"files were removed from {folder}"

    def end(reason: str) -> None:
        _log(f"ended: {reason}")
        # An error here would leave the process running.
        with suppress(OSError):
            files.remove_socket(folder, place)
        os._exit(0)

    # Answer requests. If the worker is killed, the system frees the lock.
    _log(f"process {os.getpid()} listens at {place}")
    try:
        with closing(listener), watching(parent, check, end):
            listener.settimeout(idle_seconds)
            with suppress(TimeoutError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        _attend(connection, answer)
            _log(f"ended: no request for {idle_seconds:g} seconds")
    finally:
        with suppress(OSError):
            files.remove_socket(folder, place)
        os.close(lock)


def _attend(connection: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    """Answers the request of one connection; logs the faults of the other process."""
    if not frames.is_same_user(connection):
        _log("refused the connection of another user")
        return

    # Receive the request. The other process may have ended while the request was in the queue.
    try:
        _, request = frames.receive(connection, frames.REQUEST, _deadline())
        if frames.is_closed(connection):
            return
    except frames.WrongFrame as error:
        _reply(connection, frames.ERROR, str(error).encode())
        return
    except OSError as error:
        _log(f"no request: {error}")
        return

    # Answer it.
    try:
        content = answer(request)
        kind = frames.ANSWER
        if len(content) > frames.MOST_BYTES:
            raise ValueError(f"an answer must have at most {frames.MOST_BYTES:,} bytes")
    except Exception as error:
        _log(traceback.format_exc())
        content = _sentence(error).encode()
        kind = frames.ERROR
    _reply(connection, kind, content)


def _reply(connection: socket.socket, kind: bytes, content: bytes) -> None:
    try:
        frames.send(connection, kind, content, _deadline())
    except OSError as error:
        _log(f"the answer was not taken: {error}")


def _deadline() -> float:
    return time.monotonic() + _TRANSFER_SECONDS


def _is_current(lock: int, folder: Path, place: Path) -> bool:
    """Returns whether other processes still find the lock and the socket of this worker."""
    try:
        is_locked = os.path.samestat(os.fstat(lock), os.stat(folder / files.LOCK))
    except OSError:
        return False
    return is_locked and place.is_socket() and files.address(folder) == place


def _sentence(error: Exception) -> str:
    """Returns the message of an error on one line."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return shortened(on_one_line(f"{error.strerror}{place}"))
    first = str(error).strip().partition("\n")[0]
    return shortened(on_one_line(f"{type(error).__name__}: {first}"))


def _log(text: str) -> None:
    # The log may be on a full disk.
    with suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)
