"""A model is two pure functions. Any nnx or linen module becomes one; wrapping one gives another."""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.replica import PyTree


class Model(NamedTuple):
    """A network as the trainer sees it."""

    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
    """`init(key, inputs) -> (params, model_state)`; `inputs` is `[examples, ...]` and serves only for its shape."""

    apply: Callable[[PyTree, PyTree, jax.Array, jax.Array | None], tuple[jax.Array, PyTree]]
    """`apply(params, model_state, inputs, key) -> (outputs, model_state)`, outputs in float32.

    With a key the model is in training: dropout draws from the key, batch statistics are gathered. With None it
    infers: the same inputs always give the same outputs, and the state stays as it is.
    """


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Makes a model of a function that builds an nnx module, such as `lambda rngs: MyNet(64, rngs=rngs)`.

    Raises:
        InputError: It is given a module that is already built.
    """
    if isinstance(make, nnx.Module):
        raise InputError("make", f"must be a function that builds the module, got a built {type(make).__name__}.")

    def split(rngs: nnx.Rngs):
        return nnx.split(make(rngs), nnx.Param, nnx.RngState, ...)

    graph, _, random_state, _ = nnx.eval_shape(lambda: split(nnx.Rngs(0)))

    def init(key, inputs):
        _, params, _, model_state = split(nnx.Rngs(key))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def apply(params, model_state, inputs, key):
        streams = _reseed(random_state, jax.random.key(0) if key is None else key)
        module = nnx.merge(graph, params, streams, model_state)
        module.eval() if key is None else module.train()
        outputs = module(inputs)
        _, _, model_state = nnx.state(module, nnx.Param, nnx.RngState, ...)
        return jnp.asarray(outputs, jnp.float32), nnx.to_pure_dict(model_state)

    return Model(init, apply)


def from_linen(module: linen.Module) -> Model:
    """Makes a model of a linen module.

    Whether it trains is passed as the argument that its `__call__` has for it: `train`, `training`, `is_training`,
    `deterministic` or `use_running_average`. Its random stream is `dropout`.

    Raises:
        InputError: It is given a class.
    """
    if not isinstance(module, linen.Module):
        raise InputError("module", f"must be a linen module such as MyNet(64), got {module!r:.60}.")
    arguments = signature(module.__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        says = {"train": train, "training": train, "is_training": train}
        says |= {"deterministic": not train, "use_running_average": not train}
        return {name: value for name, value in says.items() if name in arguments}

    def init(key, inputs):
        model_state = dict(module.init({"params": key, "dropout": key}, inputs, **mode(train=False)))
        params = model_state.pop("params", {})
        return params, model_state

    def apply(params, model_state, inputs, key):
        variables = {"params": params, **model_state}
        if key is None:
            outputs = module.apply(variables, inputs, **mode(train=False))
        else:
            outputs, model_state = module.apply(
                variables, inputs, **mode(train=True), rngs={"dropout": key}, mutable=list(model_state)
            )
        return jnp.asarray(outputs, jnp.float32), model_state

    return Model(init, apply)


def with_raw_inputs(model: Model, shift: jax.typing.ArrayLike, scale: jax.typing.ArrayLike) -> Model:
    """Makes the model take inputs as they are stored, and see `(inputs - shift) * scale` in the type of the scale.

    Tokens have an integer scale of 1, and stay integers.
    """

    def normalize(inputs):
        return (jnp.asarray(inputs, jnp.result_type(scale)) - shift) * scale

    return Model(
        init=lambda key, inputs: model.init(key, normalize(inputs)),
        apply=lambda params, model_state, inputs, key: model.apply(params, model_state, normalize(inputs), key),
    )


def in_bfloat16(model: Model) -> Model:
    """Makes the model compute in bfloat16; parameters, state and outputs stay float32."""

    def apply(params, model_state, inputs, key):
        outputs, model_state = model.apply(_cast(params), model_state, _cast(inputs), key)
        return outputs.astype(jnp.float32), model_state

    return Model(model.init, apply)


def count_params(params: PyTree) -> int:
    """Counts the numbers in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cast(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _reseed(random_state: nnx.State, key: jax.Array) -> nnx.State:
    """Gives every random stream of a module its own key, and sets its count to zero."""
    leaves, tree = jax.tree.flatten(random_state)
    keys = jax.random.split(key, max(1, len(leaves)))
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    fresh = [
        jax.random.split(keys[i], leaf.shape) if is_key[i] else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, fresh)
