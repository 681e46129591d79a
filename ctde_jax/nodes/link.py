"""The link between a server and its nodes, and the loop of the server over it."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from ctde_jax.nodes.server import Server

_POLL_SECONDS = 0.02


class Link(Protocol):
    """Carries requests from the server to nodes, and their replies."""

    def connected(self) -> Collection[str]:
        """Returns the identities of the nodes that are connected now."""
        ...

    def push(self, requests: Mapping[str, bytes]) -> None:
        """Sends a request to each node; returns at once."""
        ...

    def pull(self) -> list[tuple[str, bytes | str]]:
        """Returns the replies that have come, without waiting.

        Each is the identity of a node with its reply, or with a sentence if the node cannot reply
        any more. Every request has at most one of these.
        """
        ...


def run_rounds(
    server: Server,
    link: Link,
    deadline: float | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    rounds: int | None = None,
) -> None:
    """Runs the rounds of a server until the last one is closed.

    A round is closed as soon as all connected nodes have answered, or at the deadline; never with
    fewer messages than the quorum.

    Args:
        server: The server.
        link: The link to its nodes.
        deadline: Seconds after which a round with a quorum is closed; None waits for all connected
            nodes.
        is_stopped: Returns whether to return early.
        rounds: Maximum number of rounds to close; by default all.

    Raises:
        InputError: The folder of the server cannot be written to.
        NonFiniteLoss: The loss or the parameters became NaN or infinite.
    """
    asked: set[str] = set()  # nodes with a request that has no reply yet
    started = time.monotonic()
    end = math.inf if rounds is None else server.round + rounds
    while not server.is_complete and server.round < end and not is_stopped():
        now = time.monotonic()
        _accept(server, link, asked, now)

        # Close the round, or ask the nodes that have not answered.
        connected = set(link.connected())
        waiting = {each for each in connected if each in asked or server.wants(each, now)}
        is_late = deadline is not None and now - started > deadline
        if server.has_quorum and (not waiting or is_late):
            server.close()
            started = time.monotonic()
            continue
        _ask(server, link, asked, connected, now)


def send_bundle(
    server: Server, link: Link, seconds: float, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Sends the last bundle of a complete run to its nodes, also to those that connect later.

    Args:
        server: The server, which has been offered the bundle.
        link: The link to its nodes.
        seconds: Time to wait for nodes that are not connected.
        is_stopped: Returns whether to return early.

    Raises:
        InputError: The folder of the server cannot be written to.
    """
    asked: set[str] = set()
    started = time.monotonic()
    while server.lacks_bundle and not is_stopped():
        now = time.monotonic()
        _accept(server, link, asked, now)
        connected = set(link.connected())
        if now - started > seconds and not asked:
            return
        _ask(server, link, asked, connected, now)


def _accept(server: Server, link: Link, asked: set[str], now: float) -> None:
    """Passes the replies that have come to the server."""
    for identity, reply in link.pull():
        asked.discard(identity)
        if isinstance(reply, str):
            server.report(identity, reply, now)
        else:
            server.accept(identity, reply, now)


def _ask(server: Server, link: Link, asked: set[str], connected: set[str], now: float) -> None:
    """Sends the requests that are due; waits a little if there are none."""
    wanted = [each for each in connected - asked if server.wants(each, now)]
    if wanted:
        link.push({identity: server.request(identity) for identity in wanted})
        asked.update(wanted)
    else:
        time.sleep(_POLL_SECONDS)
