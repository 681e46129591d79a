"""A model is two pure functions. Any nnx or linen module becomes one; wrapping one gives another."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from inspect import signature
from typing import Any, Literal, NamedTuple

import jax
import optax
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.replica import AXIS, SHARD, PyTree

KeyPath = tuple[Hashable, ...]
"""The keys that lead to a part of nested dictionaries."""


class Stream(NamedTuple):
    """A network that reads a sequence place by place, with what it has read as a state of fixed size.

    Only for inference. What it says at the last place, or at every place, is what `Model.apply` says of the sequence.
    """

    start: Callable[[int], PyTree]
    """`start(examples) -> carry`, the state before the first place; `[examples, ...]`, float32."""

    step: Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
    """`step(params, model_state, carry, inputs) -> (outputs, carry)`; inputs are those of one place.

    Outputs are float32.
    """


class Model(NamedTuple):
    """A network as the trainer sees it."""

    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
    """`init(key, inputs) -> (params, model_state)`; `inputs` is `[examples, ...]`, some of the training examples.

    Most models read only its shape; a start that looks at the data reads all of it.
    """

    apply: Callable[[PyTree, PyTree, jax.Array, jax.Array | None], tuple[jax.Array, PyTree]]
    """`apply(params, model_state, inputs, key) -> (outputs, model_state)`, outputs in float32.

    With a key the model is in training: dropout draws from the key, batch statistics are gathered. With None it
    infers: the same inputs always give the same outputs, and the state stays as it is.
    """

    layers: Callable[[PyTree, PyTree, jax.Array], OrderedDict[KeyPath, jax.Array]] | None = None
    """`layers(params, model_state, inputs) -> {path: output}`: what each layer with a `kernel` says in inference.

    A path leads to the layer's part of `params`; the order is that of execution, and a layer that is called twice is
    heard the first time. Layers of a recurrent cell, which run once for every place, are left out. None where a model
    does not show its layers.
    """

    stream: Stream | None = None
    """How it reads a sequence place by place, where it can."""


BatchStatistics = Literal["averaged", "synchronized"]
"""Over which examples batch normalization takes its mean and variance in training.

`averaged`: over those of a device; the running averages are averaged at every aggregation. `synchronized`: over the
whole batch, so that the number of devices changes nothing; devices then talk in the midst of every step, also in steps
that they otherwise take alone. Where a batch is computed in groups, one after another, a group stands for the batch.
"""


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], batch_statistics: BatchStatistics = "averaged") -> Model:
    """Makes a model of a function that builds an nnx module, such as `lambda rngs: MyNet(64, rngs=rngs)`.

    A module that has the methods `start(examples) -> carry` and `step(carry, inputs) -> (outputs, carry)` also reads a
    sequence place by place.

    Args:
        make: Is given the random streams that the module's parts draw from.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` of its own keeps that.

    Raises:
        InputError: It is given a module that is already built.
    """
    if isinstance(make, nnx.Module):
        raise InputError("make", f"must be a function that builds the module, got a built {type(make).__name__}.")

    def split(module: nnx.Module):
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    abstract: Any = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, _, random_state, _ = split(abstract)

    def merge(params, model_state, key) -> Any:
        streams = _reseed(random_state, jax.random.key(0) if key is None else key)
        module = nnx.merge(graph, params, streams, model_state)
        module.eval() if key is None else module.train()
        return module

    def init(key, inputs):
        _, params, _, model_state = split(make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def apply(params, model_state, inputs, key):
        module = merge(params, model_state, key)
        for _, layer in nnx.iter_modules(module):
            if isinstance(layer, nnx.BatchNorm):
                layer.axis_name = layer.axis_name or _axes(batch_statistics)  # pyright: ignore[reportAttributeAccessIssue]
        outputs = module(inputs)
        _, _, model_state = nnx.state(module, nnx.Param, nnx.RngState, ...)
        return jnp.asarray(outputs, jnp.float32), nnx.to_pure_dict(model_state)

    def layers(params, model_state, inputs):
        module = merge(params, model_state, None)
        heard = _listen(module)
        module(inputs)
        return heard

    def step(params, model_state, carry, inputs):
        outputs, carry = merge(params, model_state, None).step(carry, inputs)
        return jnp.asarray(outputs, jnp.float32), optax.tree.cast(carry, jnp.float32)

    if not (hasattr(abstract, "start") and hasattr(abstract, "step")):
        return Model(init, apply, layers)
    return Model(init, apply, layers, Stream(abstract.start, step))


def from_linen(module: linen.Module, batch_statistics: BatchStatistics = "averaged") -> Model:
    """Makes a model of a linen module.

    Whether it trains is passed as the argument that its `__call__` has for it: `train`, `training`, `is_training`,
    `deterministic` or `use_running_average`. Its random stream is `dropout`.

    Args:
        module: Such as `MyNet(64)`.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` of its own keeps that.

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

    def share_statistics(call, args, kwargs, context):
        if isinstance(context.module, linen.BatchNorm) and context.module.axis_name is None:
            object.__setattr__(context.module, "axis_name", _axes(batch_statistics))
        return call(*args, **kwargs)

    def apply(params, model_state, inputs, key):
        variables = {"params": params, **model_state}
        if key is None:
            outputs = module.apply(variables, inputs, **mode(train=False))
        else:
            with linen.intercept_methods(share_statistics):
                outputs, model_state = module.apply(
                    variables, inputs, **mode(train=True), rngs={"dropout": key}, mutable=list(model_state)
                )
        return jnp.asarray(outputs, jnp.float32), model_state

    def layers(params, model_state, inputs):
        heard = OrderedDict()

        def listen(call, args, kwargs, context):
            outputs, layer = call(*args, **kwargs), context.module
            in_cell = isinstance(layer.parent, linen.RNNCellBase)
            if context.method_name == "__call__" and layer.has_variable("params", "kernel") and not in_cell:
                heard.setdefault(layer.path, outputs)
            return outputs

        with linen.intercept_methods(listen):
            module.apply({"params": params, **model_state}, inputs, **mode(train=False))
        return heard

    return Model(init, apply, layers)


def with_raw_inputs(model: Model, shift: jax.typing.ArrayLike, scale: jax.typing.ArrayLike) -> Model:
    """Makes the model take inputs as they are stored, and see `(inputs - shift) * scale` in the type of the scale.

    Tokens have an integer scale of 1, and stay integers. Where each number of an input has a scale of its own, a
    sequence is not read place by place.
    """

    def normalize(inputs):
        return (jnp.asarray(inputs, jnp.result_type(scale)) - shift) * scale

    layers, stream = model.layers, None if jnp.ndim(scale) else model.stream

    return Model(
        init=lambda key, inputs: model.init(key, normalize(inputs)),
        apply=lambda params, model_state, inputs, key: model.apply(params, model_state, normalize(inputs), key),
        layers=layers and (lambda params, model_state, inputs: layers(params, model_state, normalize(inputs))),
        stream=stream
        and stream._replace(
            step=lambda params, model_state, carry, inputs: stream.step(params, model_state, carry, normalize(inputs))
        ),
    )


def in_bfloat16(model: Model) -> Model:
    """Makes the model compute in bfloat16; parameters, state and outputs stay float32."""

    def apply(params, model_state, inputs, key):
        outputs, model_state = model.apply(_cast(params), model_state, _cast(inputs), key)
        return outputs.astype(jnp.float32), model_state

    layers, stream = model.layers, model.stream

    return Model(
        init=model.init,
        apply=apply,
        layers=layers and (lambda params, model_state, inputs: layers(_cast(params), model_state, _cast(inputs))),
        stream=stream
        and stream._replace(
            step=lambda params, model_state, carry, inputs: stream.step(
                _cast(params), model_state, _cast(carry), _cast(inputs)
            )
        ),
    )


def count_params(params: PyTree) -> int:
    """Counts the numbers in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _listen(module: nnx.Module) -> OrderedDict[KeyPath, jax.Array]:
    """Makes the layers of a module write down what they say; returns the dictionary into which they write."""
    heard = OrderedDict()

    def listening(kind: Any, path: KeyPath) -> Any:
        def call(self, *args, **kwargs):
            outputs = kind.__call__(self, *args, **kwargs)
            heard.setdefault(path, outputs)
            return outputs

        return type(kind)(kind.__name__, (kind,), {"__call__": call})

    parts = list(nnx.iter_modules(module))
    cells = {path for path, part in parts if isinstance(part, nnx.RNNCellBase)}
    for path, part in parts:
        in_cell = any(path[:depth] in cells for depth in range(len(path)))
        if isinstance(getattr(part, "kernel", None), nnx.Param) and not in_cell:
            part.__class__ = listening(type(part), path)
    return heard


def _axes(batch_statistics: BatchStatistics) -> tuple[str, ...] | None:
    """Names the axes over which examples lie that share statistics, of those that exist where a model is applied."""

    def exists(axis: str) -> bool:
        try:
            lax.axis_size(axis)
        except NameError:
            return False
        return True

    axes = (SHARD, AXIS) if batch_statistics == "synchronized" else (SHARD,)
    return tuple(filter(exists, axes)) or None


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
