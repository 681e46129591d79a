"""The two functions of a Flower app, for users of Flower: `flwr run` and `flower-supernode`.

The functions that a user passes are called in the server's process and in the worker of a node.
The process of a ClientApp lives for one message, so it passes the message to the worker, and
imports neither the user's libraries nor JAX.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.flower.link import FlowerLink
from ctde_jax.nodes.flower.message import failure, payload_of, reply
from ctde_jax.nodes.flower.work import command_of, reference_of
from ctde_jax.nodes.worker import WorkerFailed, ask

Config: TypeAlias = Mapping[str, bool | float | int | str]


def server_app(coordinate: Callable[[FlowerLink, Config], None]) -> ServerApp:
    """Returns a ServerApp that calls a function with the link to the nodes.

    Args:
        coordinate: Called once, with the link and the configuration of the run (`flwr run -c`).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinate(FlowerLink(grid), context.run_config)

    return app


def client_app(build: Callable[[Path, Config], Callable[[bytes], bytes]]) -> ClientApp:
    """Returns a ClientApp that passes messages to the worker of its node.

    A SuperNode needs the folder of the node: `--node-config 'folder="/data/hospital"'`.

    Args:
        build: Function of a module that returns the function from a request to its reply. It is
            called once, in the worker, with the folder and the configuration of the node.

    Raises:
        InputError: If `build` is not a function of a module.
    """
    reference = reference_of(build)
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        payload = payload_of(message)
        if payload is None:
            return failure("The request was not made by ctde_jax.", message)
        try:
            folder = _folder(context)
            return reply(ask(folder, command_of(reference, context.node_config), payload), message)
        # The server reports the sentence of these errors.
        except (InputError, WorkerFailed, TimeoutError) as error:
            return failure(shortened(str(error)), message)

    return app


def _folder(context: Context) -> Path:
    folder = context.node_config.get("folder")
    if not isinstance(folder, str) or not Path(folder).is_absolute():
        raise InputError(
            "folder",
            "must be the absolute path of the node's folder in the configuration of the SuperNode: "
            "--node-config 'folder=\"/data/hospital\"'.",
        )
    return Path(folder)
