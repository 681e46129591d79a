"""A node: takes requests from a server one by one, answers them, and waits for the next."""

# pyright: reportMissingImports=false
import threading
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.flower.connection import Connection, Reply, Request

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
    reply = None
    while not stop.is_set() and not is_done():
        request = connection.exchange(reply)
        reply = None if request is None else _reply(request, answer, log)
    if reply is not None:
        connection.exchange(reply, wait=False)


def _reply(request: Request, answer: Callable[[bytes], bytes], log: Callable[[str], None]) -> Reply:
    try:
        return Reply(request, answer(request.payload))
    except Exception as error:  # the server reports it, and the node continues
        sentence = shortened(f"{type(error).__name__}: {error}")
        log(f"A request failed: {sentence}")
        return Reply(request, sentence.encode(), failed=True)
