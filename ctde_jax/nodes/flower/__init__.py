"""The transport between server and nodes: opaque bytes over Flower (https://flower.ai)."""

from importlib.util import find_spec

from ctde_jax.errors import InputError


def check_installed() -> None:
    """Raises InputError unless Flower is installed."""
    if find_spec("flwr") is None:
        raise InputError(
            "Flower", "must be installed between nodes; run pip install 'ctde_jax[flower]'."
        )
