"""The SuperLink of a server, as a process: `python -m ctde_jax.nodes.flower.superlink`.

Flower's SuperLink serves nodes (Fleet API), the user (Control API: start any code, register any
node) and the running app (Runtime API) on one port, and only the first asks for a key. This process
therefore puts a guard before it: everything but what nodes need requires a secret, which the server
passes on standard input, and the size of a request is limited. The process ends if standard input
is closed, so it does not outlive the server, not even if that is killed.
"""

# pyright: reportMissingImports=false
import hmac
import logging
import os
import sys
import threading
from argparse import ArgumentParser

from ctde_jax.nodes.flower.paths import EXCHANGE, OPEN, SECRET


class Guard:
    """ASGI middleware: the secret for all but nodes, the size of requests, closed until opened.

    Args:
        app: SuperLink's application.
        secret: Value of the header `SECRET` that gives access to everything.
        most_bytes: Largest body of a request of a node.
    """

    def __init__(self, app, secret: str, most_bytes: int):
        self._app = app
        self._secret = secret.encode()
        self._most_bytes = most_bytes
        self._is_open = False

    async def __call__(self, scope, receive, send) -> None:
        """Passes a request on, or answers with a status of 4xx or 5xx."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        status = self._check(scope["path"], dict(scope["headers"]))
        if status is None:
            await self._app(scope, receive, send)
            return
        # The connection ends, as the body of the request was not read.
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _check(self, path: str, headers: dict[bytes, bytes]) -> int | None:
        """Returns the status of a refusal, or None."""
        if hmac.compare_digest(headers.get(SECRET.encode(), b""), self._secret):
            if path == OPEN:
                self._is_open = True
                return 204
            return None
        if not path.startswith("/v1/fleet/") and path != EXCHANGE:
            return 403
        if not self._is_open:
            return 503
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411
        return 413 if int(length) > self._most_bytes else None


def main() -> None:
    """Serves until standard input is closed."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--most-bytes", type=int, required=True)
    parser.add_argument("--certificates", nargs=3, metavar=("CA", "CERTIFICATE", "KEY"))
    options = parser.parse_args()
    secret = sys.stdin.readline().strip()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

    import uvicorn

    from ctde_jax.nodes.flower.exchange import Exchange

    # Flower logs a line for each reply.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    uvicorn.run(
        Guard(Exchange(_create_app(options)), secret, options.most_bytes),
        host=options.host,
        port=options.port,
        ssl_certfile=options.certificates and options.certificates[1],
        ssl_keyfile=options.certificates and options.certificates[2],
        access_log=False,
        log_level="warning",
        # Two headers less in each response.
        server_header=False,
        date_header=False,
        # A node that computes for a while keeps its connection.
        timeout_keep_alive=120,
        workers=1,
    )


def _create_app(options):
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=options.host,
        port=options.port,
        insecure=options.certificates is None,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=options.certificates is not None,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        # Nodes sign on again and requests are sent again after a restart, so nothing is kept.
        database=":flwr-in-memory:",
        # The server runs the app in its process; see `server`.
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
