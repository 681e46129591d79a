"""Centralized training, decentralized execution: one Flax model, trained over many devices.

A room imports only rooms that stand before it in this list; see `docs/architecture.md` for what to read first:

    errors, bundle              exceptions and their checks; what a node has: numpy alone
    devices                     where training runs
    data                        what is learned from
    models, aggregate           what is learned; how replicas agree
    rounds                      what the devices compute
    cost, checkpoint            what a round costs; how nothing is lost
    trainer                     what the host does
    config                      from words to objects and back
    export                      how a model leaves
    train, execute, wire, ...   the commands

The public names are those of `__init__.pyi`. Each is imported when it is first used: `import ctde_jax` alone neither
imports JAX nor touches a device.
"""

import ast
from importlib import import_module
from pathlib import Path

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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return import_module(f"{__name__}.{name}")
    room = import_module(f"{__name__}.{home}")
    return getattr(room, name) if hasattr(room, name) else import_module(f"{room.__name__}.{name}")
