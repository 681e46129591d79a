"""Federated training: nodes with separate data, and a server that combines their messages.

A *node* has data that never leave it. It takes the local steps of a round and sends a message, the
encoded change of the parameters, to the *server*, which combines the messages of a round and
answers all nodes with the same bytes. From these, every node computes the next *center*: the
central parameters, the model state and the state of the outer optimizer.

`Node` and `Server` exchange bytes and do not depend on how they travel; `flower/` carries them over
Flower's SuperLink. Names are imported on first use, because short-lived processes import this
package, and must not wait for JAX.
"""

import ast
from importlib import import_module
from pathlib import Path

# As in `ctde_jax`, the stub is the one list of public names.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
