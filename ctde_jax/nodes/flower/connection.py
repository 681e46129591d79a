"""A node's connection to a SuperLink: Flower's Fleet API, spoken by one process.

Flower's SuperNode starts a process for each message, polls every 3 s, runs code that the server
sends, and is refused for up to a minute if it restarts after a kill. This connection needs no other
process, runs only code that is installed on the machine of the node, and is accepted at once. A
SuperLink cannot distinguish it from a SuperNode.
"""

# pyright: reportMissingImports=false
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from ctde_jax.errors import InputError, quoted, shortened
from ctde_jax.nodes.keys import check_insecure, identity_of, load_node_key

# A node counts as online until two heartbeats are missing. Flower's SuperNode has 30 s.
HEARTBEAT = 15.0  # seconds
_FIRST_DELAY = 0.25  # seconds, between attempts to reach a server; grows to
_LAST_DELAY = 5.0
_TEMPORARY = (502, 503, 504)
# A request is announced before its content is uploaded; the content is then asked for again.
_LEAST_BACKOFF = 0.05  # seconds
_MOST_UPLOAD = 60.0


class RequestDropped(Exception):
    """Raised if the server dropped a request, such as one of a run that has ended."""


class Connection:
    """Connection of one node to a SuperLink, which survives restarts of either.

    Args:
        address: `host:port` of the SuperLink.
        folder: Folder of the node, with `node.key`; the file `node.id` is written to it.
        authority: Certificate of the server's authority; None for a connection without TLS.
        stop: If set, the connection no longer waits for a server that is not reachable.
        log: Prints a line if the server is lost or found again.

    Raises:
        InputError: If the server's certificate has another authority, if the server does not
            accept the key of the node, or if a connection without TLS would leave the machine.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        authority: Path | None,
        stop: threading.Event,
        log: Callable[[str], None],
    ):
        check_insecure(authority is None, address.rpartition(":")[0])
        private = load_node_key(folder)
        self._public = public_key_to_bytes(private.public_key())
        self._address = address
        self._id_file = folder / "node.id"
        self._is_secure = authority is not None
        self._log = log
        self._stop = stop
        self._activating = threading.Lock()
        self._client = FleetHttpClient.from_server_address(
            address,
            not self._is_secure,
            _read_authority(authority),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
        )
        self._node = Node()
        try:
            self._activate(self._node)
        except BaseException:
            self._client.close()
            raise
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def receive(self) -> Message | None:
        """Returns the next request, or None if there is none."""
        node = self._node
        try:
            pulled = self._call(self._client.PullMessages, PullMessagesRequest(node=node))
            if not pulled.messages_list:
                return None
            run = pulled.messages_list[0].metadata.run_id
            tree = pulled.message_object_trees[0]
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._bound(self._client.PullObject), node, run),
                make_confirm_message_received_fn_protobuf(
                    self._bound(self._client.ConfirmMessageReceived), node, run
                ),
                return_type=Message,
                max_time=_MOST_UPLOAD,
                initial_backoff=_LEAST_BACKOFF,
            )
        except (RequestDropped, ObjectPullError):
            self._activate(node)
            return None
        # An object does not contain its id.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def send(self, reply: Message) -> None:
        """Sends the reply to a request; it is dropped if the run of the request has ended."""
        node = self._node
        run = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
            try:
                pushed = self._call(self._client.PushMessages, request)
                push_objects(
                    get_all_nested_objects(reply),
                    make_push_object_fn_protobuf(
                        self._bound(self._client.PushObject), node, run, pushed.session_id
                    ),
                    object_ids_to_push=set(pushed.objects_to_push),
                )
            except RequestDropped as dropped:
                self._log(f"A reply was dropped: {dropped}")

    def close(self) -> None:
        """Signs off; the server then sees at once that the node is offline."""
        self._stop.set()
        self._heart.join()
        with suppress(httpx.HTTPError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def _beat(self) -> None:
        """Sends heartbeats. A server that was restarted gets to know the node again by this."""
        while not self._stop.wait(HEARTBEAT * 0.8):
            node = self._node
            try:
                self._client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT)
                )
            except httpx.HTTPStatusError:
                # The main thread gets the same error, and raises it.
                with suppress(InputError, RequestDropped):
                    self._activate(node)
            except httpx.HTTPError:
                pass  # The main thread reports that the server is not reachable.

    def _activate(self, former: Node) -> None:
        """Signs on and sets the node's id, unless another thread has replaced `former` by now."""
        with self._activating:
            if self._node is not former:
                return
            if not self._is_secure:
                register = RegisterNodeFleetRequest(public_key=self._public)
                with suppress(RequestDropped):  # if it is registered
                    self._call(self._client.RegisterNode, register)
            activate = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
            try:
                activated = self._call(self._client.ActivateNode, activate)
            except RequestDropped:
                # A process of this node that was killed counts as online until two of its
                # heartbeats are missing, and a node that is online is refused.
                self._deactivate_former()
                try:
                    activated = self._call(self._client.ActivateNode, activate)
                except RequestDropped:
                    raise self._refused() from None
            self._node = Node(node_id=activated.node_id)
            self._id_file.write_text(f"{activated.node_id}\n")

    def _deactivate_former(self) -> None:
        with suppress(OSError, ValueError, RequestDropped):
            former = int(self._id_file.read_text())
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=former))

    def _refused(self) -> InputError:
        return InputError(
            "server",
            f"{self._address} does not accept the key of this node, {identity_of(self._public)}; "
            f"add the line of {self._id_file.with_name('node.pub')} to the server's list of keys.",
        )

    def _bound(self, call: Callable) -> Callable:
        return lambda request: self._call(call, request)

    def _call(self, call: Callable, request):
        """Calls the server, as often as it takes until it answers.

        Raises:
            RequestDropped: If the server refuses the request, or the connection is closed.
            InputError: If the server's certificate has another authority.
        """
        delay = _FIRST_DELAY
        reported = False
        while True:
            try:
                response = call(request)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status not in _TEMPORARY:
                    raise RequestDropped(_reason(status, error.response.text)) from None
            except httpx.TransportError as error:
                self._check_certificate(error)
            else:
                if reported:
                    self._log(f"The server {self._address} is reachable again.")
                return response
            if not reported and delay > 1:
                self._log(f"The server {self._address} is not reachable; trying again.")
                reported = True
            if self._stop.wait(delay):
                raise RequestDropped("the connection was closed")
            delay = min(1.5 * delay, _LAST_DELAY)

    def _check_certificate(self, error: httpx.TransportError) -> None:
        """Raises InputError if no later attempt can succeed."""
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise InputError(
                "server",
                f"must be the machine that signed ca.pem, but {self._address} has another "
                f"certificate ({shortened(str(error))}); get ca.pem from the server, or connect by "
                "a name for which the server was started.",
            ) from None
        if "WRONG_VERSION_NUMBER" in str(error):
            raise InputError(
                "server", f"must have TLS, but {self._address} has not; start it with TLS."
            ) from None
        is_tls = "disconnected without sending" in str(error) and not self._is_secure
        if is_tls and not self._node.node_id:
            raise InputError(
                "insecure", f"must be left out, as the server {self._address} has TLS."
            ) from None


def _reason(status: int, text: str) -> str:
    """Returns the sentence for a request that the server refused."""
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        return "it is larger than the server accepts."
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return "the server was restarted, and will ask again."
    return f"the server answered with status {status} ({shortened(text)})."


def _read_authority(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
        ssl.create_default_context(cadata=content.decode())
    except (OSError, ValueError, ssl.SSLError):
        raise InputError(
            "authority", f"must be a copy of the server's ca.pem, got {quoted(str(path))}."
        ) from None
    return content
