"""The worker of a node with Flower's SuperNode: `python -m ctde_jax.nodes.flower.work`."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from ctde_jax.errors import InputError, quoted
from ctde_jax.nodes.worker import serve

if TYPE_CHECKING:
    from ctde_jax.nodes.node import Node


def reference_of(argument: str, function: Callable) -> str:
    """Returns a text by which another process finds a function: `directory|module|name`.

    Args:
        argument: Name of the argument, for the error.
        function: The function.

    Raises:
        InputError: If the function is not a function of a module.
    """
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    if file is None or "<" in function.__qualname__ or function.__module__ == "__main__":
        raise InputError(
            argument,
            "must be a function that another process can import by its name, got "
            f"{quoted(function)}; define it at the top level of a module.",
        )
    # Modules inside of packages are found from the directory that contains the outermost package.
    depth = function.__module__.count(".") + (Path(file).name == "__init__.py")
    directory = Path(file).resolve().parents[depth]
    return "|".join((str(directory), function.__module__, function.__qualname__))


def load(reference: str) -> Callable:
    """Imports the function of `reference_of`."""
    directory, module, name = reference.split("|")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return attrgetter(name)(import_module(module))


def command_of(
    references: Sequence[str], config: Mapping[str, bool | float | int | str]
) -> list[str]:
    """Returns the command of the worker of a node; its last argument, its folder, is missing.

    Args:
        references: References of the functions that make the federation and the data.
        config: Configuration of the node, with its folder.
    """
    program = ["-m", "ctde_jax.nodes.flower.work"]
    # -P: modules in the working directory of the SuperNode are not imported.
    return [sys.executable, "-P", *program, *references, json.dumps(dict(config), sort_keys=True)]


class NodeOfRuns:
    """A node of a SuperNode, which takes part in one run after another.

    Args:
        make_federation: As of `client_app`.
        make_data: As of `client_app`.
        config: Configuration of the node.
    """

    def __init__(self, make_federation: Callable, make_data: Callable, config: Mapping):
        self._make_federation = make_federation
        self._make_data = make_data
        self._config = config
        self._say = partial(print, flush=True)
        self._run = ""
        self._node: Node | None = None

    def answer(self, request: bytes) -> bytes:
        """Returns the reply to a request, by the node of its run, which has a folder for itself.

        Raises:
            InputError: The request is not valid.
        """
        from ctde_jax import devices  # not at the top, as these import JAX
        from ctde_jax.nodes.envelope import unpack
        from ctde_jax.nodes.node import Node, Setup

        run = unpack(request).value("run", str)
        if not re.fullmatch(r"[0-9a-f]{1,64}", run):
            raise InputError("run", f"must be a name of hexadecimal digits, got {quoted(run)}.")
        if self._node is None or run != self._run:
            folder = Path(self._config["folder"])

            def setup(options):
                data = self._make_data(self._config)
                return Setup(data, lambda data: self._make_federation(data, options))

            name = str(self._config.get("name", folder.name))
            self._node = Node(folder / f"run-{run}", setup, devices.start(), name, say=self._say)
            self._run = run
        return self._node.answer(request)


def main() -> None:
    """Answers requests until none comes any more."""
    *references, written, folder = sys.argv[1:]
    make_federation, make_data = map(load, references)
    serve(folder, NodeOfRuns(make_federation, make_data, json.loads(written)).answer)


if __name__ == "__main__":
    main()
