"""Centralized training, decentralized execution: one Flax model, trained over many devices.

A room, that is a module or subpackage, imports only rooms before it in this list;
`docs/architecture.md` suggests a reading order:

    errors, bundle              exceptions and checks; bundles and their runtimes, with numpy alone
    devices                     devices, hosts, and the replica axis
    data                        data sets, partitions, batches
    models, aggregate           networks and tasks; strategies and reducers
    rounds                      the computation of the devices
    cost, checkpoint            communicated bytes; checkpoints and run folders
    trainer                     the training loop of the host
    config                      options of the command line, and the objects that they build
    export                      bundles and web pages of trained models
    train, execute, wire, ...   commands

The public names are those of `__init__.pyi`. Each is imported on first use, so that
`import ctde_jax` neither imports JAX nor initializes a device.
"""

import ast
from importlib import import_module, metadata
from pathlib import Path

# The stub is the one list of public names: type checkers read it, and so does this module.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `from . import name` in the stub has no module: the name is a submodule of this package.
    home = _HOMES[name]
    if home is None:
        return import_module(f"{__name__}.{name}")
    room = import_module(f"{__name__}.{home}")
    return getattr(room, name) if hasattr(room, name) else import_module(f"{room.__name__}.{name}")
