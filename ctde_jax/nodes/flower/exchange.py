"""One request for a whole turn of a node: its reply goes up, and its next request comes down.

Over Flower's Fleet API, a turn takes ten requests with 1.2 kB of headers each, and a node that
waits for its next request polls. The process of the SuperLink therefore answers turns at
`paths.EXCHANGE`: it makes the ten requests within the process, in the name of the node, and
holds the response back until there is a request for the node. Flower checks the signature of the
node in each of them.

If a connection breaks, the node makes the same call again. Its reply counts once, and a request
whose response was lost is sent again, as requests are numbered within a session: from one sign-on
of the node to the next.
"""

# pyright: reportMissingImports=false
import asyncio
import struct
import time
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from ctde_jax.nodes.flower.message import failure, payload_of, reply
from ctde_jax.nodes.flower.paths import EXCHANGE

# The server pushes requests for nodes here.
_PUSH = "/v1/runtime/push-messages"

# A node counts as online until two heartbeats are missing. Flower's SuperNode has 30 s.
HEARTBEAT = 15.0  # seconds

# Content that is announced is uploaded at once, unless the server was killed.
_MOST_UPLOAD = 60.0  # seconds
_POLL = 0.02


class Kind(IntEnum):
    """Kind of the body of a turn."""

    NOTHING = 0
    REPLY = 1
    FAILURE = 2
    HEARTBEAT = 3


class Turn(NamedTuple):
    """The body of an exchange, as the node sends it."""

    node: int
    """Flower's id of the node."""

    session: bytes
    """Random bytes of the sign-on."""

    number: int
    """Number of the last request that the node has received in the session, from 1; else 0."""

    kind: Kind
    seconds: int
    """How long to wait for a request, at most 255."""

    payload: bytes = b""
    """Reply to the request `number`, or the sentence of its failure."""

    def pack(self) -> bytes:
        """Returns the bytes of the turn."""
        return _HEADER.pack(*self[:-1]) + self.payload

    @staticmethod
    def unpack(body: bytes) -> "Turn":
        """Inverts `pack`.

        Raises:
            ValueError: The bytes are not a turn.
        """
        if len(body) < _HEADER.size:
            raise ValueError("too short")
        node, session, number, kind, seconds = _HEADER.unpack_from(body)
        return Turn(node, session, number, Kind(kind), seconds, body[_HEADER.size :])


_HEADER = struct.Struct("<Q8sIBB")
_NUMBER = struct.Struct("<I")


def pack_request(number: int, payload: bytes) -> bytes:
    """Returns the body of the response; that of a response without a request is empty."""
    return _NUMBER.pack(number) + payload


def unpack_request(body: bytes) -> tuple[int, bytes]:
    """Inverts `pack_request`."""
    return _NUMBER.unpack_from(body)[0], body[_NUMBER.size :]


class Exchange:
    """ASGI middleware: answers the turns of nodes by calls of Flower's Fleet API.

    Args:
        app: SuperLink's application, which gets all other requests.
    """

    def __init__(self, app: Any):
        self._app = app
        self._fleet = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
            base_url="http://superlink/v1/fleet/",
        )
        self._keys: dict[int, str] = {}  # public keys of the nodes, as in Flower's header
        self._sessions: dict[int, bytes] = {}  # the newest of each node
        self._deliveries: dict[int, _Delivery] = {}  # the last of each node, until it is answered
        self._pushed = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        """Answers a turn, or passes a request on."""
        if scope["type"] == "http" and scope["path"] == EXCHANGE:
            status, body = await self._answer(dict(scope["headers"]), await _read(receive))
            headers = [(b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)
        if scope.get("path") == _PUSH:
            # Nodes that wait look for requests again.
            self._pushed.set()
            self._pushed = asyncio.Event()

    async def _answer(self, headers: Mapping[bytes, bytes], body: bytes) -> tuple[int, bytes]:
        """Returns status and body of the response to a turn.

        Args:
            headers: Timestamp, signature and public key of the node, as Flower's Fleet API has
                them; the key may be left out after the first turn of a session.
            body: The turn.
        """
        try:
            turn = Turn.unpack(body)
        except ValueError:
            return httpx.codes.BAD_REQUEST, b"not a turn"
        given = {name: headers.get(name.encode(), b"").decode("latin-1") for name in _SIGNED}
        key = given[FLEET_HTTP_PUBLIC_KEY_HEADER] or self._keys.get(turn.node, "")
        node = _Fleet(self._fleet, {**given, FLEET_HTTP_PUBLIC_KEY_HEADER: key}, turn.node)
        try:
            # Flower refuses it unless the key is that of the node, and the signature that of the
            # key.
            await node.heartbeat()
            self._keys[turn.node] = key
            if turn.kind == Kind.HEARTBEAT:
                return httpx.codes.OK, b""
            return httpx.codes.OK, await self._take(node, turn)
        except httpx.HTTPStatusError as error:
            return error.response.status_code, error.response.content

    async def _take(self, node: "_Fleet", turn: Turn) -> bytes:
        """Delivers the reply of a turn, and returns the next request, or nothing."""
        self._sessions[turn.node] = turn.session
        last = self._deliveries.get(turn.node)
        if last is not None and last.session != turn.session:
            # The process that was to answer it is gone.
            del self._deliveries[turn.node]
            await node.confirm(last)
            await node.push(failure("The node was restarted.", last.message))
        elif last is not None and last.number == turn.number:
            del self._deliveries[turn.node]
            await node.confirm(last)
            if turn.kind == Kind.REPLY:
                await node.push(reply(turn.payload, last.message))
            if turn.kind == Kind.FAILURE:
                await node.push(failure(turn.payload.decode(errors="replace"), last.message))
        return await self._next(node, turn)

    async def _next(self, node: "_Fleet", turn: Turn) -> bytes:
        """Returns the next request, as soon as there is one, or nothing."""
        number = turn.number + 1
        end = time.monotonic() + turn.seconds
        while self._sessions[turn.node] == turn.session:
            pushed = self._pushed
            # A delivery without a reply: the connection broke before its response arrived.
            found = self._deliveries.get(turn.node) or await node.pull()
            if found is not None:
                found = found._replace(session=turn.session, number=number)
                self._deliveries[turn.node] = found
                payload = await node.payload(found)
                if payload is not None:
                    return pack_request(number, payload)
                del self._deliveries[turn.node]
                await node.confirm(found)
                await node.push(failure("The request was not made by ctde_jax.", found.message))
            try:
                await asyncio.wait_for(pushed.wait(), end - time.monotonic())
            except TimeoutError:
                break
        return b""


_SIGNED = (TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER)


async def _read(receive) -> bytes:
    """Returns the body of a request."""
    parts = []
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return b"".join(parts)


class _Delivery(NamedTuple):
    """A request that a node has, or should have."""

    message: Message  # without its content
    tree: Any  # ids of the objects of the content
    session: bytes = b""
    number: int = 0


class _Fleet:
    """Flower's Fleet API, in the name of one node."""

    def __init__(self, client: httpx.AsyncClient, signed: Mapping[str, str], node: int):
        self._client = client
        self._headers = {**signed, "content-type": PROTOBUF_MEDIA_TYPE}
        self._node = Node(node_id=node)

    async def heartbeat(self) -> None:
        """Sends Flower a heartbeat of the node."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
        await self._call("send-node-heartbeat", request, SendNodeHeartbeatResponse)

    async def pull(self) -> _Delivery | None:
        """Returns the next message for the node, if there is one."""
        request = PullMessagesRequest(node=self._node)
        pulled = await self._call("pull-messages", request, PullMessagesResponse)
        if not pulled.messages_list:
            return None
        message = message_from_proto(pulled.messages_list[0])
        return _Delivery(message, pulled.message_object_trees[0])

    async def payload(self, delivery: _Delivery) -> bytes | None:
        """Returns the payload of a message, or None if there is none of ours."""
        contents: dict[str, bytes] = {}
        end = time.monotonic() + _MOST_UPLOAD
        for part in iterate_object_tree(delivery.tree):
            request = PullObjectRequest(
                node=self._node,
                run_id=delivery.message.metadata.run_id,
                object_id=part.object_id,
            )
            # A message is announced before its content is uploaded.
            while True:
                pulled = await self._call("pull-object", request, PullObjectResponse)
                if pulled.object_available:
                    break
                if time.monotonic() > end:
                    return None
                await asyncio.sleep(_POLL)
            contents[part.object_id] = pulled.object_content
        message = inflate_object_from_contents(delivery.tree.object_id, contents)
        return payload_of(message) if isinstance(message, Message) else None

    async def confirm(self, delivery: _Delivery) -> None:
        """Lets Flower drop the content of a message."""
        request = ConfirmMessageReceivedRequest(
            node=self._node,
            run_id=delivery.message.metadata.run_id,
            message_object_id=delivery.tree.object_id,
        )
        await self._call("confirm-message-received", request, ConfirmMessageReceivedResponse)

    async def push(self, message: Message) -> None:
        """Sends a reply."""
        run = message.metadata.run_id
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            announced = message_to_proto(remove_content_from_message(message))
            tree = get_object_tree(message)
            objects = get_all_nested_objects(message)
        request = PushMessagesRequest(
            node=self._node, messages_list=[announced], message_object_trees=[tree]
        )
        pushed = await self._call("push-messages", request, PushMessagesResponse)
        for name, each in objects.items():
            if name in pushed.objects_to_push:
                content = PushObjectRequest(
                    node=self._node,
                    run_id=run,
                    object_id=name,
                    object_content=each.deflate(),
                    session_id=pushed.session_id,
                )
                await self._call("push-object", content, PushObjectResponse)

    async def _call(self, path: str, request: Any, kind: type) -> Any:
        """Calls a method of the API.

        Raises:
            httpx.HTTPStatusError: Flower refuses the call.
        """
        response = await self._client.post(
            path, content=request.SerializeToString(), headers=self._headers
        )
        response.raise_for_status()
        return kind.FromString(response.content)
