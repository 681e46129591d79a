"""Files of a worker in the folder of its node: the lock, the log and the socket.

The lock is an open file that the asking process locks and the worker inherits. So at most one
worker runs or starts, and the lock of a killed worker is free at once.
"""

import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ctde_jax.errors import InputError

LOCK = "worker.lock"
LOG = "worker.log"
SOCKET = "worker.sock"

LOCK_VARIABLE = "CTDE_JAX_WORKER_LOCK"
"""Environment variable with the file descriptor of the lock that a worker inherits."""

_LOG_BYTES = 2**20

# The limit includes a final zero byte: 104 bytes on macOS and BSD, 108 on Linux.
_ADDRESS_BYTES = 103

_QUEUE = 128


def make_private(folder: Path) -> None:
    """Creates a folder if necessary, and denies other users access to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def lock(folder: Path) -> int | None:
    """Locks a folder for a worker.

    Returns:
        A file descriptor, which has the lock until it is closed here and in all processes that
        inherit it. None if a worker runs or starts.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def inherited_lock(folder: Path) -> int | None:
    """Returns the lock of a folder with which this process was started; None without one."""
    handle = int(os.environ.pop(LOCK_VARIABLE, "-1"))
    try:
        is_lock = os.path.samestat(os.fstat(handle), os.stat(folder / LOCK))
    except OSError:
        return None
    if not is_lock:
        return None
    # Processes that the worker starts must not keep the lock when the worker has ended.
    os.set_inheritable(handle, False)
    return handle


def open_log(folder: Path) -> BinaryIO:
    """Opens the log for appending."""
    limit_log(folder)
    return (folder / LOG).open("ab")


def limit_log(folder: Path) -> None:
    """Moves the lines of a log of more than 1 MiB to a second file, which replaces an older one.

    A process that is writing to the log continues at the beginning of the emptied file.
    """
    log = folder / LOG
    with suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            with log.open("rb") as lines:
                lines.seek(-_LOG_BYTES, os.SEEK_END)
                (folder / f"{LOG}.1").write_bytes(lines.read(_LOG_BYTES))
            os.truncate(log, 0)


def address(folder: Path) -> Path | None:
    """Returns the address of the worker's socket; None if there is no socket."""
    path = folder / SOCKET
    if path.is_symlink():
        return Path(os.readlink(path))
    return path if path.exists() else None


def listen(folder: Path) -> socket.socket:
    """Opens the socket of a folder's worker, which only this user can connect to.

    If the path is too long for an address, the socket is in a new private folder for temporary
    files, and the folder has a symbolic link to it. The caller must have the lock.

    Args:
        folder: Resolved path of the folder.

    Raises:
        InputError: If the folder for temporary files has too long a path, too.
        OSError: If the folder cannot be written to.
    """
    # Remove the socket of a worker that was killed.
    stale = address(folder)
    if stale is not None:
        remove_socket(folder, stale)

    path = folder / SOCKET
    is_short = len(os.fsencode(path)) <= _ADDRESS_BYTES
    place = path if is_short else Path(tempfile.mkdtemp(prefix="ctde_jax-")) / SOCKET
    if len(os.fsencode(place)) > _ADDRESS_BYTES:
        place.parent.rmdir()
        raise InputError(
            "TMPDIR",
            f"must be a short path, as a socket has at most {_ADDRESS_BYTES} bytes, got "
            f"{tempfile.gettempdir()}; set the environment variable TMPDIR=/tmp.",
        )

    # The mode is set before `listen`: no process can connect earlier.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    place.chmod(0o600)
    listener.listen(_QUEUE)
    if not is_short:
        path.symlink_to(place)
    return listener


def remove_socket(folder: Path, place: Path) -> None:
    """Removes a socket at an address, its temporary folder, and the link to it.

    The folder itself may have been removed.
    """
    if place.is_socket():
        place.unlink()
    (folder / SOCKET).unlink(missing_ok=True)
    if place.name == SOCKET and place.parent.name.startswith("ctde_jax-"):
        # `rmdir` fails if the folder is missing or has other files.
        with suppress(OSError):
            place.parent.rmdir()
