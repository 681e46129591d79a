"""A node: takes requests from a server one by one, answers them, and waits for the next."""

# pyright: reportMissingImports=false
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.flower.connection import Connection
from ctde_jax.nodes.flower.message import failure, payload_of, reply

# A node asks for its next request again after a quarter of the time that it has waited, so waiting
# adds a quarter to a round at most, and a long round costs few polls, of 1.2 kB each.
_WAIT_SHARE = 0.25
_LEAST_WAIT = 0.1  # seconds
_MOST_WAIT = 3.0

_FAREWELL = 2.0  # seconds


def run_node(
    folder: Path,
    address: str,
    answer: Callable[[bytes], bytes],
    *,
    authority: Path | None,
    is_done: Callable[[], bool] = lambda: False,
    stop: threading.Event | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Answers the requests of a server until `stop` is set.

    Args:
        folder: Folder of the node, with the key of `keys.create_node_key`.
        address: `host:port` of the server.
        answer: Computes the reply to a request. A server sends a request again if the node or the
            server was restarted, so the same request must have the same reply. If it raises, the
            server gets the message of the exception.
        authority: Certificate of the server's authority; None for a connection without TLS, which
            is allowed on loopback only.
        is_done: Returns whether the last reply ends the node, once it has been sent.
        stop: Ends the node after the request at hand.
        log: Prints a line.

    Raises:
        InputError: If another process of this node runs, if the server does not accept the node, or
            if the server's certificate is wrong.
    """
    lock = FileLock(folder / "node.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            "folder", f"must belong to one process, but a node runs in {folder} already."
        ) from None
    stop = stop or threading.Event()
    try:
        connection = Connection(address, folder, authority, stop, log)
        try:
            _serve(connection, answer, is_done, stop, log)
            # Flower drops the last reply if the node signs off before the server has it.
            if is_done():
                stop.wait(_FAREWELL)
        finally:
            connection.close()
    finally:
        lock.release()


def _serve(
    connection: Connection,
    answer: Callable[[bytes], bytes],
    is_done: Callable[[], bool],
    stop: threading.Event,
    log: Callable[[str], None],
) -> None:
    since = time.monotonic()
    while not stop.is_set() and not is_done():
        message = connection.receive()
        if message is None:
            wait = _WAIT_SHARE * (time.monotonic() - since)
            stop.wait(min(max(wait, _LEAST_WAIT), _MOST_WAIT))
            continue
        payload = payload_of(message)
        if payload is None:
            connection.send(failure("The request was not made by ctde_jax.", message))
        else:
            try:
                response = reply(answer(payload), message)
            except Exception as error:  # the server reports it, and the node goes on
                sentence = shortened(f"{type(error).__name__}: {error}")
                log(f"A request failed: {sentence}")
                response = failure(sentence, message)
            connection.send(response)
        since = time.monotonic()
