"""The server's side: one request for each node, and the replies as they arrive."""

# pyright: reportMissingImports=false
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from ctde_jax.errors import shortened
from ctde_jax.nodes.flower.arriving import Arriving
from ctde_jax.nodes.flower.message import MESSAGE_TYPE, content_of, payload_of
from ctde_jax.nodes.keys import identity_of

# Asking for the nodes costs about 5 ms.
_NODES_EVERY = 0.5  # seconds

_LATE = "The deadline passed."


class FlowerLink:
    """Exchanges bytes with the nodes of a Flower run.

    Node ids are Flower's: they change if the SuperLink restarts, or, with Flower's own SuperNode
    without authentication, if the node restarts. `identity` is what stays.

    Args:
        grid: Flower's grid, as a ServerApp gets it.
        restart: Called if the SuperLink is lost; returns the grid of a new run. Without it, the
            error of the grid is raised.
    """

    def __init__(self, grid: Grid, restart: Callable[[], Grid] | None = None):
        self._grid = grid
        self._restart = restart
        self._arriving = Arriving(grid)
        self._online: set[int] = set()
        self._seen: dict[int, _Node] = {}
        self._read_at = -_NODES_EVERY
        self._outstanding: dict[str, _Request] = {}  # by Flower's id of the message
        self._failed: list[tuple[int, str]] = []

    def nodes(self) -> set[int]:
        """Returns the ids of the nodes that are online, at most 0.5 s old.

        A node that lost its connection counts as online until two of its heartbeats are missing.
        """
        if time.monotonic() - self._read_at >= _NODES_EVERY:
            infos = self._call(lambda grid: list(grid.get_nodes()), [])
            self._online = {info.node_id for info in infos}
            for info in infos:
                identity = identity_of(info.public_key)
                self._seen[info.node_id] = _Node(identity, info.name, info.last_activated_at)
            self._read_at = time.monotonic()
        return set(self._online)

    def identity(self, node: int) -> str:
        """Returns the fingerprint of the public key of a node, which may be offline by now."""
        return self._seen[node].identity

    def name(self, node: int) -> str:
        """Returns the name of a node in the list of keys, or "" if it has none."""
        return self._seen[node].name

    def push(self, requests: Mapping[int, bytes], deadline: float) -> None:
        """Sends one request to each node, and returns at once.

        Args:
            requests: Payload for each node id.
            deadline: Seconds after which a request or its reply is dropped; then `pull` returns an
                error for it.
        """
        self.nodes()
        if not requests:
            return
        messages = [
            Message(content_of(payload), node, MESSAGE_TYPE, ttl=deadline)
            for node, payload in requests.items()
        ]
        ids = self._call(lambda grid: list(grid.push_messages(messages)), [""] * len(messages))
        for node, message in zip(requests, ids, strict=True):
            if message and node in self._online:
                activated = self._seen[node].activated
                end = time.monotonic() + deadline
                self._outstanding[message] = _Request(node, activated, end)
            else:
                self._failed.append((node, "The request was not accepted by the SuperLink."))

    def pull(self) -> list[tuple[int, bytes | str]]:
        """Returns the replies that have arrived since the last call, without waiting.

        Returns:
            Pairs of a node id and its payload, or of a node id and the sentence of an error: the
            node failed, was restarted, went offline, or the deadline passed. No reply follows an
            error.
        """
        arrived: list[tuple[int, bytes | str]] = []
        if self._outstanding:
            pending = set(self._outstanding)
            for message in self._call(lambda _: self._arriving.pull(pending), []):
                sent = self._outstanding.pop(message.metadata.reply_to_message_id, None)
                if sent is not None:
                    arrived.append((sent.node, _read(message)))
                if message.has_error():
                    # The node may have been restarted, and the next request is for its new process.
                    self._read_at = -_NODES_EVERY
            self._drop_lost()
        arrived += self._failed
        self._failed = []
        return arrived

    def _drop_lost(self) -> None:
        """Fails the requests whose node was restarted, or whose deadline has passed."""
        online = self.nodes()
        for message, request in list(self._outstanding.items()):
            is_online = request.node in online
            if is_online and self._seen[request.node].activated != request.activated:
                sentence = "The node was restarted."
            elif time.monotonic() > request.end:
                sentence = _LATE
            else:
                continue
            del self._outstanding[message]
            self._failed.append((request.node, sentence))

    def _call(self, call: Callable[[Grid], list], otherwise: list) -> list:
        """Calls the grid; if the SuperLink is lost, fails all requests and starts a new run."""
        try:
            return call(self._grid)
        except (httpx.HTTPError, RunNotRunningException):
            if self._restart is None:
                raise
        self._failed += [
            (request.node, "The SuperLink was restarted.") for request in self._outstanding.values()
        ]
        self._outstanding = {}
        self._online = set()
        self._grid = self._restart()
        self._arriving = Arriving(self._grid)
        return otherwise


class _Request(NamedTuple):
    """A request that has no reply yet."""

    node: int
    activated: str  # of the node when the request was sent
    end: float  # deadline, of the monotonic clock


class _Node(NamedTuple):
    """Fields of Flower's NodeInfo."""

    identity: str
    name: str
    activated: str  # time at which the node signed on


def _read(message: Message) -> bytes | str:
    if message.has_error():
        if message.error.code == ErrorCode.MESSAGE_UNAVAILABLE:
            # Flower has dropped the request.
            return _LATE
        if message.error.code == ErrorCode.NODE_UNAVAILABLE:
            return "The node went offline."
        return shortened(message.error.reason or f"Flower's error {message.error.code}.")
    payload = payload_of(message)
    return "The reply was not made by ctde_jax." if payload is None else payload
