"""The worker of a node with Flower's SuperNode: `python -m ctde_jax.nodes.flower.work`."""

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path

from ctde_jax.errors import InputError, quoted
from ctde_jax.nodes.worker import serve


def reference_of(function: Callable) -> str:
    """Returns a text by which another process finds a function: `directory|module|name`.

    Raises:
        InputError: If the function is not a function of a module.
    """
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    if file is None or "<" in function.__qualname__ or function.__module__ == "__main__":
        raise InputError(
            "build",
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


def command_of(reference: str, config: Mapping[str, bool | float | int | str]) -> list[str]:
    """Returns the command of the worker of a node.

    Args:
        reference: Reference of a function of the node's folder and configuration, which returns
            the function from a request to its reply.
        config: Configuration of the node, with its folder.
    """
    program = ["-m", "ctde_jax.nodes.flower.work"]
    # -P: modules in the working directory of the SuperNode are not imported.
    return [sys.executable, "-P", *program, reference, json.dumps(dict(config), sort_keys=True)]


def main() -> None:
    """Answers requests until none comes any more."""
    reference, config = sys.argv[1], json.loads(sys.argv[2])
    folder = Path(config["folder"])
    serve(folder, load(reference)(folder, config))


if __name__ == "__main__":
    main()
