"""A node's connection to the SuperLink of a server, in one process.

Flower's SuperNode starts a process for each message, polls every 3 s, runs code that the server
sends, and is refused for up to a minute if it restarts after a kill. This connection needs no other
process, runs only code that is installed on the machine of the node, and is accepted at once. It
signs on by Flower's Fleet API like a SuperNode; replies and requests travel as turns, see
`exchange.py`.
"""

# pyright: reportMissingImports=false
import secrets
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    RegisterNodeFleetRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from ctde_jax.errors import InputError, quoted, shortened
from ctde_jax.nodes.flower.exchange import HEARTBEAT, Kind, Turn, unpack_request
from ctde_jax.nodes.flower.paths import EXCHANGE
from ctde_jax.nodes.keys import check_insecure, identity_of, load_node_key

# A turn is a heartbeat as well, so a node that waits for requests needs no other.
_WAIT = 10  # seconds that the server may hold a turn
_BEAT = 12.0
_SLOWEST = 60.0  # seconds without a byte after which a turn is lost

_FIRST_DELAY = 0.25  # seconds, between attempts to reach a server; grows to
_LAST_DELAY = 5.0
_TEMPORARY = (502, 503, 504)


@dataclass
class _Session:
    """The session of a node, from one sign-on to the next."""

    node: int = 0
    """Flower's id of the node; 0 before the first sign-on."""

    token: bytes = field(default_factory=lambda: secrets.token_bytes(8))
    number: int = 0
    """Number of the last request that has been received."""

    has_key: bool = False
    """Whether the server remembers the public key of the node."""


class Request(NamedTuple):
    """A request of the server."""

    payload: bytes
    session: _Session


class Reply(NamedTuple):
    """The reply to a request."""

    request: Request
    payload: bytes
    """The reply, or a sentence in UTF-8 if it could not be computed."""

    failed: bool = False


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
        self._key = load_node_key(folder)
        self._public = public_key_to_bytes(self._key.public_key())
        self._address = address
        self._id_file = folder / "node.id"
        self._is_secure = authority is not None
        self._log = log
        self._stop = stop
        self._activating = threading.Lock()
        content = _read_authority(authority)
        self._client = FleetHttpClient.from_server_address(
            address,
            not self._is_secure,
            content,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self._key, self._key.public_key()),
            ],
        )
        self._turns = _client(address, content)
        self._turned = -_BEAT  # time of the last turn, of the monotonic clock
        self._session = _Session()
        try:
            self._activate(self._session)
        except BaseException:
            self._client.close()
            raise
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def exchange(self, reply: Reply | None, wait: bool = True) -> Request | None:
        """Sends the reply to the last request, if there is one, and returns the next request.

        Args:
            reply: The reply; it is dropped if the run of its request has ended.
            wait: Whether to wait for the next request.

        Returns:
            The request, or None if there is none yet.
        """
        if reply is not None and reply.request.session is not self._session:
            self._log(f"A reply was dropped: {_RESTARTED}")
            reply = None
        session = self._session
        kind = Kind.NOTHING
        if reply is not None:
            kind = Kind.FAILURE if reply.failed else Kind.REPLY
        payload = b"" if reply is None else reply.payload
        seconds = _WAIT if wait else 0
        try:
            content = self._call(lambda _: self._turn(session, kind, seconds, payload), None)
        except RequestDropped as dropped:
            if reply is not None:
                self._log(f"A reply was dropped: {dropped}")
            elif not self._stop.is_set():
                self._activate(session)
            return None
        if not content:
            return None
        session.number, request = unpack_request(content)
        return Request(request, session)

    def _turn(self, session: _Session, kind: Kind, seconds: int, payload: bytes = b"") -> bytes:
        """Takes a turn; returns the body of the response.

        Raises:
            httpx.HTTPError: The server refuses the turn, or is not reachable.
        """
        self._turned = time.monotonic()
        signed = now().isoformat(timespec="milliseconds")
        headers = {
            TIMESTAMP_HEADER: signed,
            FLEET_HTTP_SIGNATURE_HEADER: _text(sign_message(self._key, signed.encode())),
        }
        if not session.has_key:
            headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = _text(self._public)
        turn = Turn(session.node, session.token, session.number, kind, seconds, payload)
        response = self._turns.post(EXCHANGE, content=turn.pack(), headers=headers)
        response.raise_for_status()
        session.has_key = True
        return response.content

    def close(self) -> None:
        """Signs off; the server then sees at once that the node is offline."""
        self._stop.set()
        self._heart.join()
        with suppress(httpx.HTTPError):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._session.node))
        self._turns.close()
        self._client.close()

    def _beat(self) -> None:
        """Sends heartbeats while there are no turns.

        A server that was restarted gets to know the node again by this.
        """
        while not self._stop.wait(max(0.0, self._turned + _BEAT - time.monotonic())):
            if time.monotonic() - self._turned < _BEAT:
                continue
            session = self._session
            try:
                self._turn(session, Kind.HEARTBEAT, 0)
            except httpx.HTTPStatusError:
                # The main thread gets the same error, and raises it.
                with suppress(InputError, RequestDropped):
                    self._activate(session)
            except httpx.HTTPError:
                pass  # The main thread reports that the server is not reachable.

    def _activate(self, former: _Session) -> None:
        """Signs on for a new session, unless another thread has replaced `former` by now."""
        with self._activating:
            if self._session is not former:
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
            self._session = _Session(activated.node_id)
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
        if is_tls and not self._session.node:
            raise InputError(
                "insecure", f"must be left out, as the server {self._address} has TLS."
            ) from None


_RESTARTED = "the server was restarted, and will ask again."


def _reason(status: int, text: str) -> str:
    """Returns the sentence for a request that the server refused."""
    if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        return "it is larger than the server accepts."
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return _RESTARTED
    return f"the server answered with status {status} ({shortened(text)})."


def _client(address: str, authority: bytes | None) -> httpx.Client:
    """Returns a client for turns, whose requests have no headers but the necessary ones."""
    verify: ssl.SSLContext | bool = True
    if authority is not None:
        verify = ssl.create_default_context(cadata=authority.decode())
    scheme = "http" if authority is None else "https"
    client = httpx.Client(base_url=f"{scheme}://{address}", verify=verify, timeout=_SLOWEST)
    client.headers.clear()
    return client


def _text(content: bytes) -> str:
    return b64encode(content).decode()


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
