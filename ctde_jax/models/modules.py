"""Whatever a user has: a module, its class, or a function that builds it, as a model."""

import functools
from inspect import isclass
from typing import Any

import jax
from flax import linen, nnx

from ctde_jax.errors import InputError
from ctde_jax.models.base import Model
from ctde_jax.models.linen_modules import from_linen
from ctde_jax.models.nnx_modules import from_nnx

_WAYS_OUT = {
    "Trained": "pass its field model",
    "Optimizer": "pass the module, and the optax transformation as the optimizer",
    "TrainState": "pass the module, and let fit make the state",
    "Transformed": "rewrite the function as a flax module",
    "TransformedWithState": "rewrite the function as a flax module",
}
_OTHER_LIBRARIES = {
    "equinox": "equinox",
    "haiku": "haiku",
    "torch": "PyTorch",
    "keras": "Keras",
    "tensorflow": "Keras",
}


def as_model(module: Any) -> Model:
    """Makes a model of an nnx or linen module, its class, or a function that builds it; a model stays as it is.

    A function or class of nnx is given random streams, see `from_nnx`; one of linen is called without arguments.

    Raises:
        InputError: It is something else; see also `from_nnx` and `from_linen`.
    """
    if isinstance(module, Model):
        return module
    kind: Any = module if isclass(module) else type(module)
    if isinstance(module, nnx.Optimizer) or kind.__name__ in _WAYS_OUT:
        way_out = _WAYS_OUT.get(kind.__name__, _WAYS_OUT["Optimizer"])
        raise InputError(
            "model", f"must be a flax module or a Model, got {kind.__name__}; {way_out}."
        )
    for base in kind.__mro__:
        library = _OTHER_LIBRARIES.get(base.__module__.split(".")[0])
        if library and not issubclass(kind, (nnx.Module, linen.Module)):
            raise InputError(
                "model",
                f"must be a flax module, got {kind.__name__} of {library}; rewrite it in flax.",
            )
    network: Any = module
    if isinstance(module, linen.Module) or _builds_linen(module):
        return from_linen(network)
    if isinstance(module, nnx.Module) or callable(module):
        return from_nnx(network)
    raise InputError(
        "model",
        "must be an nnx or linen module, a class or function that builds one, or made by models.mlp(...), "
        f"models.from_nnx(YourModule) or models.from_linen(YourModule()), got {kind.__name__} {module!r:.60}.",
    )


def _builds_linen(module: Any) -> bool:
    """Whether a class, or a function that takes no arguments, builds a linen module."""
    made = module.func if isinstance(module, functools.partial) else module
    if isclass(made) or not callable(module):
        return isclass(made) and issubclass(made, linen.Module)
    built = []
    try:
        jax.eval_shape(lambda: built.append(module()))  # an nnx module is not computed
    except Exception:
        return False
    return isinstance(built[0], linen.Module)
