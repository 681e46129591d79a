"""Frames on a worker's socket: one byte for the kind, eight for the length, then the content."""

import os
import socket
import struct
import time

REQUEST = b"Q"
ANSWER = b"A"
ERROR = b"E"
"""Kinds of a frame; the content of an error is a sentence in UTF-8."""

MOST_BYTES = 2**31
"""Largest content of a frame, in bytes."""

_HEADER = struct.Struct(">cQ")

# Memory is allocated for received bytes only, whatever length a header announces.
_CHUNK_BYTES = 2**20


class WrongFrame(Exception):
    """Raised if a header has an unknown kind or too large a length."""


def send(connection: socket.socket, kind: bytes, content: bytes, deadline: float) -> None:
    """Sends a frame.

    Args:
        connection: Connected socket.
        kind: Kind of the frame, one byte.
        content: Any bytes, at most `MOST_BYTES`.
        deadline: Time of `time.monotonic()` at which sending fails.

    Raises:
        ConnectionError: If the other process has closed the connection or has ended.
        TimeoutError: If the frame is not sent at the deadline.
    """
    connection.settimeout(_seconds_to(deadline))
    connection.sendall(_HEADER.pack(kind, len(content)))
    connection.sendall(content)


def receive(connection: socket.socket, kinds: bytes, deadline: float) -> tuple[bytes, bytes]:
    """Receives a frame and returns its kind and content.

    Args:
        connection: Connected socket.
        kinds: Kinds that may come, one byte each.
        deadline: Time of `time.monotonic()` at which receiving fails.

    Raises:
        ConnectionError: If the other process has closed the connection or has ended.
        TimeoutError: If the frame is not complete at the deadline.
        WrongFrame: If the header is invalid.
    """
    kind, length = _HEADER.unpack(_receive_bytes(connection, _HEADER.size, deadline))
    if kind not in kinds:
        raise WrongFrame(f"a frame must begin with one of {kinds!r}, got {kind!r}.")
    if length > MOST_BYTES:
        raise WrongFrame(f"a frame must have at most {MOST_BYTES:,} bytes, got {length:,}.")
    return kind, _receive_bytes(connection, length, deadline)


def is_same_user(connection: socket.socket) -> bool:
    """Returns whether the process at the other end belongs to this user.

    It is always true on systems without `SO_PEERCRED`, which rely on the modes of the files.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = struct.Struct("3i")  # process, user, group
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return credentials.unpack(option)[1] == os.geteuid()


def is_closed(connection: socket.socket) -> bool:
    """Returns whether the other process has closed the connection or has ended."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def _receive_bytes(connection: socket.socket, count: int, deadline: float) -> bytes:
    chunks = []
    while count:
        connection.settimeout(_seconds_to(deadline))
        chunk = connection.recv(min(count, _CHUNK_BYTES))
        if not chunk:
            raise ConnectionResetError("the connection was closed within a frame")
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def _seconds_to(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline has passed")
    return seconds
