"""Makes a model from a module, its class, or a function that builds it."""

import functools
from inspect import isclass
from typing import Any

import jax
from flax import linen, nnx

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.base import Model, unscaled
from ctde_jax.models.linen_modules import LinenAdapter, from_linen
from ctde_jax.models.nnx_modules import NnxAdapter, from_nnx

# Objects that are commonly passed by mistake, by the name of their class.
_WAYS_OUT = {
    "Trained": "pass its field model",
    "Optimizer": "pass the module, and the optax transformation as the optimizer",
    "TrainState": "pass the module, from which fit creates the state",
    "Transformed": "rewrite the function as a flax module",
    "TransformedWithState": "rewrite the function as a flax module",
}
# Top-level packages in which the base classes of other libraries are defined.
_OTHER_LIBRARIES = {
    "equinox": "equinox",
    "haiku": "haiku",
    "torch": "PyTorch",
    "keras": "Keras",
    "tensorflow": "Keras",
}


def as_model(module: Any) -> Model:
    """Makes a model from an nnx or linen module, its class, or a function that builds it.

    A model is returned unchanged. A class or function that builds an nnx module receives RNG
    streams, see `from_nnx`; one that builds a linen module is called without arguments.

    Raises:
        InputError: If `module` is none of these, or as for `from_nnx` and `from_linen`.

    Examples:
        >>> model = ctde.models.as_model(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> isinstance(model, ctde.models.Model)
        True
    """
    if isinstance(module, Model):
        return module

    # Reject objects of other libraries by name, as these may not be installed.
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

    # Linen first: `from_nnx` accepts any callable.
    network: Any = module
    if isinstance(module, linen.Module) or _builds_linen(module):
        return from_linen(network)
    if isinstance(module, nnx.Module) or callable(module):
        return from_nnx(network)
    raise InputError(
        "model",
        "must be an nnx or linen module, a class or function that builds one, or a Model, such as "
        "models.mlp(...), models.from_nnx(YourModule) or models.from_linen(YourModule()), got "
        f"{kind.__name__} {module!r:.60}.",
    )


def module_of(model: Model, params: PyTree, model_state: PyTree) -> Any:
    """Returns the flax module from which a model was made, with these parameters and state.

    Returns:
        An nnx module, or the pair of a linen module and its variables, in inference mode.

    Raises:
        InputError: If the model was not made from a module, or computes something else.

    Examples:
        >>> model = ctde.models.as_model(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> params, model_state = model.init(jax.random.key(0), np.ones((1, 4), np.float32))
        >>> ctde.models.module_of(model, params, model_state).kernel.shape
        (4, 3)
    """
    # An adapter's `apply` is a bound method. A function in its place, as of `in_bfloat16`, may
    # compute something else than the module.
    adapter = getattr(unscaled(model).apply, "__self__", None)
    if not isinstance(adapter, NnxAdapter | LinenAdapter):
        raise InputError(
            "model",
            "must be made from an nnx or linen module, without in_bfloat16 or another apply, to be "
            "returned as a module; call predict instead.",
        )
    return adapter.module(params, model_state)


def _builds_linen(module: Any) -> bool:
    """Returns whether a class, or a function without arguments, builds a linen module."""
    made = module.func if isinstance(module, functools.partial) else module
    if isclass(made) or not callable(module):
        return isclass(made) and issubclass(made, linen.Module)
    built = []
    try:
        # Under `eval_shape` no array of an nnx module is computed.
        jax.eval_shape(lambda: built.append(module()))
    except Exception:
        return False
    return isinstance(built[0], linen.Module)
