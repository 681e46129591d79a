"""The two functions of a Flower app, for users of Flower: `flwr run` and `flower-supernode`.

The functions that a user passes are called in the ServerApp's process and in the worker of a node.
The process of a ClientApp lives for one message, so it passes the message to the worker, and
imports neither the user's libraries nor JAX. The module of the app should therefore import them
inside of its functions; `ctde_jax` itself is imported lazily.
"""

# pyright: reportMissingImports=false
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.flower.message import failure, payload_of, reply
from ctde_jax.nodes.flower.work import command_of, reference_of
from ctde_jax.nodes.worker import WorkerFailed, ask

if TYPE_CHECKING:
    from ctde_jax.data import Dataset
    from ctde_jax.nodes.federation import Federation

Config: TypeAlias = Mapping[str, bool | float | int | str]
MakeData: TypeAlias = Callable[[Config], "Dataset"]
MakeFederation: TypeAlias = Callable[["Dataset", Config], "Federation"]


def server_app(
    make_federation: MakeFederation,
    make_data: MakeData,
    *,
    quorum: int | None = None,
    deadline: float | None = None,
) -> ServerApp:
    """Returns a ServerApp that trains with the nodes, and sends them the bundle of the result.

    The configuration of the run needs the folder of the run on the server:
    `flwr run . --run-config 'folder="/data/run"'`. A run with the folder of an earlier one that has
    ended early continues it.

    Args:
        make_federation: Makes the federation from the data of the server and the configuration of
            the run.
        make_data: Makes the data set with the test split, on which the server evaluates, from the
            configuration of the run.
        quorum: As of `nodes.serve`.
        deadline: As of `nodes.serve`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # These import JAX, which the process of a ClientApp must not.
        from ctde_jax.nodes.flower.link import FlowerLink
        from ctde_jax.nodes.serving import coordinate

        config = context.run_config
        folder = _folder(config, "run", "--run-config 'folder=\"/data/run\"'")
        data = make_data(config)
        trained = coordinate(
            make_federation(data, config),
            data,
            folder,
            lambda server: nullcontext(FlowerLink(grid)),
            quorum=quorum,
            deadline=deadline,
            options=config,
        )
        print(trained)

    return app


def client_app(make_federation: MakeFederation, make_data: MakeData) -> ClientApp:
    """Returns a ClientApp that passes messages to the worker of its node.

    The configuration of a SuperNode needs the folder of the node:
    `flower-supernode --node-config 'folder="/data/hospital"'`. It has a folder for each run.

    Args:
        make_federation: Function of a module, the one of `server_app`; it gets the data of the node
            and the configuration of the run.
        make_data: Function of a module that makes the data set of the node from the configuration
            of the node.

    Raises:
        InputError: If an argument is not a function of a module.
    """
    references = [
        reference_of("make_federation", make_federation),
        reference_of("make_data", make_data),
    ]
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        payload = payload_of(message)
        if payload is None:
            return failure("The request was not made by ctde_jax.", message)
        try:
            config = context.node_config
            folder = _folder(config, "node", "--node-config 'folder=\"/data/hospital\"'")
            command = command_of(references, config)
            # Another version of the app or the configuration has another worker.
            place = folder / f"worker-{sha256(repr(command).encode()).hexdigest()[:8]}"
            return reply(ask(place, [*command, str(place)], payload), message)
        # The server reports the sentence of these errors.
        except (InputError, WorkerFailed) as error:
            return failure(shortened(str(error)), message)

    return app


def _folder(config: Config, owner: str, example: str) -> Path:
    folder = config.get("folder")
    if not isinstance(folder, str) or not Path(folder).is_absolute():
        raise InputError(
            "folder",
            f"must be the absolute path of the folder of the {owner} in its configuration, such as "
            f"{example}.",
        )
    return Path(folder)
