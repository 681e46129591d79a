"""A model is two pure functions. Any nnx or linen module becomes one; wrapping one gives another."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError

KeyPath = tuple[Hashable, ...]
"""The keys that lead to a part of nested dictionaries."""


class Recurrence(NamedTuple):
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

    apply: Callable[..., tuple[PyTree, PyTree]]
    """`apply(params, model_state, inputs, key, mask=None) -> (outputs, model_state)`.

    Outputs are an array or a pytree of arrays: floats in float32, other types as they are.

    With a key the model is in training: dropout draws from the key, batch statistics are gathered. With None it
    infers: the same inputs always give the same outputs, whatever the other examples are, and the state stays as it is.

    `mask` is `bool[examples]`: False for an example that is repeated to fill a short batch, and must not count in batch
    statistics. Only a model that has a state is given one, and only in training.
    """

    layers: Callable[[PyTree, PyTree, jax.Array], OrderedDict[KeyPath, jax.Array]] | None = None
    """`layers(params, model_state, inputs) -> {path: output}`: what each layer with a `kernel` says in inference.

    A path leads to the layer's part of `params`; the order is that of execution, and a layer that is called twice is
    heard the first time. Layers of a recurrent cell, which run once for every place, are left out. None where a model
    does not show its layers.
    """

    stream: Recurrence | None = None
    """How it reads a sequence place by place, where it can."""

    unscaled: "Unscaled | None" = None
    """What `with_raw_inputs` wrapped, if it did."""


class Unscaled(NamedTuple):
    """A model before `with_raw_inputs`, and the functions that this made of it."""

    model: Model
    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]


def unscaled(model: Model) -> Model:
    """Returns the model that `with_raw_inputs` wrapped, or the model itself.

    Raises:
        InputError: It was changed since it was wrapped, so that its inputs would be scaled twice.
    """
    if model.unscaled is None:
        return model
    before, init, apply = model.unscaled
    if (model.init, model.apply) != (init, apply):
        raise InputError(
            "model",
            "must not be made from the model of a Trained, which scales its inputs; change the model that was given to "
            "fit, and pass init_from=trained to start from the trained parameters.",
        )
    return before


def with_raw_inputs(
    model: Model, shift: jax.typing.ArrayLike, scale: jax.typing.ArrayLike
) -> Model:
    """Makes the model take inputs as they are stored, and see `(inputs - shift) * scale` in the type of the scale.

    Tokens have an integer scale of 1, and stay integers. Where each number of an input has a scale of its own, a
    sequence is not read place by place.
    """

    def normalize(inputs):
        return (jnp.asarray(inputs, jnp.result_type(scale)) - shift) * scale

    layers, stream = model.layers, None if jnp.ndim(scale) else model.stream

    def init(key, inputs):
        return model.init(key, normalize(inputs))

    def apply(params, model_state, inputs, key, *mask):
        return model.apply(params, model_state, normalize(inputs), key, *mask)

    return Model(
        init=init,
        apply=apply,
        layers=layers
        and (lambda params, model_state, inputs: layers(params, model_state, normalize(inputs))),
        stream=stream
        and stream._replace(
            step=lambda params, model_state, carry, inputs: stream.step(
                params, model_state, carry, normalize(inputs)
            )
        ),
        unscaled=Unscaled(model, init, apply),
    )


def in_bfloat16(model: Model) -> Model:
    """Makes the model compute in bfloat16; parameters, state and outputs stay float32."""

    def apply(params, model_state, inputs, key, *mask):
        outputs, model_state = model.apply(_cast(params), model_state, _cast(inputs), key, *mask)
        return as_outputs(outputs), model_state

    layers, stream = model.layers, model.stream

    return Model(
        init=model.init,
        apply=apply,
        layers=layers
        and (lambda params, model_state, inputs: layers(_cast(params), model_state, _cast(inputs))),
        stream=stream
        and stream._replace(
            step=lambda params, model_state, carry, inputs: stream.step(
                _cast(params), model_state, _cast(carry), _cast(inputs)
            )
        ),
        unscaled=model.unscaled,
    )


def as_outputs(outputs: PyTree) -> PyTree:
    """Makes what a network returns a pytree of arrays: floats in float32, other types as they are.

    Raises:
        InputError: It returns nothing, or something other than arrays.
    """
    for leaf in jax.tree.leaves(outputs):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            kind = type(leaf).__name__
            raise InputError(
                "model",
                f"must return an array, or containers of arrays, and it returns {kind}; a dataclass must be registered "
                "as a pytree, as flax.struct.dataclass does.",
            )
    if not jax.tree.leaves(outputs):
        raise InputError(
            "model",
            f"must return an array, and it returns {outputs!r:.40}; does __call__ end in return?",
        )
    return jax.tree.map(_as_output, outputs)


def _as_output(leaf: jax.typing.ArrayLike) -> jax.Array:
    array = jnp.asarray(leaf)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def count_params(params: PyTree) -> int:
    """Counts the numbers in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cast(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
