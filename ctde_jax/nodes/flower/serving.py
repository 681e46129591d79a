"""A server: a SuperLink, and a Flower run that this process executes itself."""

# pyright: reportMissingImports=false
import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.certificates import Certificates
from ctde_jax.nodes.flower.link import FlowerLink
from ctde_jax.nodes.flower.paths import OPEN, SECRET
from ctde_jax.nodes.flower.processes import SuperLink, SuperLinkKilled, reachable
from ctde_jax.nodes.keys import PublicKey, check_insecure

_MOST_BYTES = 256 * 2**20
# Flower ends a run if its process is silent for a minute.
_HEARTBEAT = 20.0  # seconds
# A SuperLink may be killed at each start, such as for lack of memory.
_MOST_STARTS = 10

# Flower requires that a run has an app. Nodes of `node` execute none, and a SuperNode of Flower,
# which would, finds no function in it.
_APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "ctde-jax"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "ctde-jax"

[tool.flwr.app.components]
serverapp = "ctde_jax.nodes.flower:server"
clientapp = "ctde_jax.nodes.flower:client"
"""


@contextmanager
def serve(
    folder: Path,
    host: str,
    port: int,
    *,
    certificates: Certificates | None,
    allowed: Sequence[PublicKey] = (),
    most_bytes: int = _MOST_BYTES,
    log: Callable[[str], None] = print,
) -> Iterator[FlowerLink]:
    """Starts a server of nodes, and ends it when the context is left.

    If the SuperLink is killed, the link starts it again, and the nodes sign on again.

    Args:
        folder: Folder of the server, for the log of the SuperLink.
        host: Address to listen on, such as 0.0.0.0.
        port: Port to listen on.
        certificates: Certificates from `create_certificates`. None serves without TLS and
            accepts all nodes, on loopback only.
        allowed: Public keys of the nodes that are accepted.
        most_bytes: Largest reply of a node, in bytes.
        log: Prints a line if the SuperLink is started again.

    Yields:
        The link to the nodes.

    Raises:
        InputError: If the port is in use, or if a server without TLS would be reachable from other
            machines.
    """
    check_insecure(certificates is None, host)
    server = _Server(folder, host, port, certificates, allowed, most_bytes)

    def restart() -> HttpGrid:
        log("The SuperLink ended; it is started again.")
        return server.start()

    try:
        yield FlowerLink(server.start(), restart)
    finally:
        server.stop()


class _Secret:
    """Interceptor of Flower's clients that adds the secret of the guard."""

    def __init__(self, secret: str):
        self._secret = secret

    def intercept(self, context, call_next) -> httpx.Response:
        context.request.headers[SECRET] = self._secret
        return call_next(context)


class _Server:
    """The SuperLink and the run that this process executes; both are new after each start."""

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        certificates: Certificates | None,
        allowed: Sequence[PublicKey],
        most_bytes: int,
    ):
        self._start_superlink = lambda: SuperLink(folder, host, port, certificates, most_bytes)
        self._address = f"{reachable(host)}:{port}"
        self._authority = None if certificates is None else certificates.authority.read_bytes()
        self._allowed = allowed
        self._superlink: SuperLink | None = None
        self._run: _Run | None = None

    def start(self) -> HttpGrid:
        """Ends the former SuperLink and run, starts new ones, and returns the grid of the run.

        Raises:
            InputError: If the SuperLink does not start, or is killed each time.
        """
        reason = ""
        for _ in range(_MOST_STARTS):
            self.stop()
            try:
                return self._start()
            except SuperLinkKilled as error:
                reason = str(error)
            except httpx.TransportError as error:
                # The connection of a process that is killed ends a little before the process.
                if self._superlink is not None and not self._superlink.has_ended(1.0):
                    raise
                reason = f"The SuperLink ended ({shortened(str(error))})."
        raise InputError(
            "port", f"must be one that Flower can serve, but {_MOST_STARTS} starts failed: {reason}"
        )

    def _start(self) -> HttpGrid:
        self._superlink = self._start_superlink()

        # Register the nodes and start a run, as `flwr supernode register` and `flwr run` do.
        control = self._client(ControlHttpClient)
        for key in self._allowed:
            control.RegisterNode(RegisterNodeRequest(public_key=key.pem, name=key.name or None))
        content, _ = build_fab_from_files({"pyproject.toml": _APP.encode()})
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        control.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        control.close()

        # Execute the run in this process, in the place of Flower's SuperExec.
        runtime = self._client(RuntimeHttpClient)
        acquired = runtime.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        )
        runtime.close()
        token = RuntimeTokenHttpInterceptor(acquired.token)
        self._run = _Run(self._client(RuntimeHttpClient, token))
        self._open()
        return self._run.grid(self._address, self._authority, acquired.token)

    def stop(self) -> None:
        """Ends the run and the SuperLink."""
        if self._run is not None:
            self._run.stop()
            self._run = None
        if self._superlink is not None:
            self._superlink.stop()
            self._superlink = None

    def _open(self) -> None:
        """Lets nodes in, as their keys are registered now."""
        assert self._superlink is not None
        scheme = "http"
        verify = True
        if self._authority is not None:
            scheme = "https"
            verify = ssl.create_default_context(cadata=self._authority.decode())
        headers = {SECRET: self._superlink.secret}
        url = f"{scheme}://{self._address}{OPEN}"
        httpx.post(url, headers=headers, verify=verify).raise_for_status()

    def _client(self, kind, *interceptors):
        assert self._superlink is not None
        return kind.from_server_address(
            self._address,
            self._authority is None,
            self._authority,
            interceptors=[
                _Secret(self._superlink.secret),
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                *interceptors,
            ],
        )


class _Run:
    """A Flower run, kept alive by a thread until `stop`."""

    def __init__(self, client: RuntimeHttpClient):
        self._client = client
        self._task = client.PullTaskInput(PullTaskInputRequest())
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def grid(self, address: str, authority: bytes | None, token: str) -> HttpGrid:
        """Returns the grid of the run, from which messages get their sender."""
        TaskIdentity.task_id = self._task.task_id
        TaskIdentity.run_id = self._task.run.run_id
        TaskIdentity.node_id = self._task.context.node_id
        grid = HttpGrid(address, authority is None, authority, token=token)
        # The grid's client would lack the secret, and try for ever to reach a lost SuperLink.
        grid._client = self._client
        grid.set_run(run_from_proto(self._task.run))
        return grid

    def stop(self) -> None:
        """Ends the thread; Flower ends the run when its SuperLink ends."""
        self._stop.set()
        self._heart.join()
        self._client.close()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            # Without a SuperLink, the next call of the link starts it again.
            with suppress(httpx.HTTPError):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
