"""A node over the network: it answers the requests of a server until the run ends."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax

from ctde_jax.errors import InputError
from ctde_jax.nodes.keys import check_insecure, create_node_key
from ctde_jax.nodes.node import MakeSetup, Node


def join(
    address: str,
    folder: Path,
    setup: MakeSetup,
    devices: Sequence[jax.Device],
    *,
    name: str,
    index: int | None = None,
    authority: Path | None = None,
    insecure: bool = False,
    say: Callable[[str], None] = partial(print, flush=True),
) -> Node:
    """Takes part in the rounds of a server until the run has ended, or Ctrl-C or SIGTERM.

    The same call continues after an interruption of any kind.

    Args:
        address: `host:port` of the server.
        folder: Folder of the node: its key, its state, and at the end the bundle.
        setup: Makes the data of the node, which do not leave it, and the federation.
        devices: Devices of the node.
        name: Name of the node, a word.
        index: Index of the node, which determines the order of its examples; by default the first
            one that is free.
        authority: Certificate of the server's authority, the server's `certificates/ca.pem`.
        insecure: Whether to connect without TLS and authentication, on loopback only.
        say: Prints a line.

    Raises:
        InputError: An argument is invalid, the folder is in use or has another run, or the server
            does not accept the node or has another certificate.
    """
    from ctde_jax.nodes.flower.node import run_node  # requires the extra

    check_insecure(insecure, address.rpartition(":")[0])
    if not insecure and authority is None:
        raise InputError(
            "authority",
            "must be the certificate ca.pem of the server; on loopback, insecure does without.",
        )
    create_node_key(folder, name)
    node = Node(folder, setup, devices, name, index, say)
    with _ended_by_sigterm() as stop:
        run_node(
            folder,
            address,
            node.answer,
            authority=None if insecure else authority,
            is_done=lambda: node.is_done or node.failure is not None,
            stop=stop,
            log=say,
        )
    if node.failure is not None:
        raise node.failure
    return node


@contextmanager
def _ended_by_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, so that the node signs off.

    A node that just ends counts as online until two of its heartbeats are missing.
    """
    stop = threading.Event()
    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
