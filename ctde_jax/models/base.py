"""A model is a pair of pure functions, made from any nnx or linen module or from another model."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float32, Key, Shaped

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError

KeyPath = tuple[Hashable, ...]
"""Path to a node of nested dictionaries, from the outermost key to the innermost."""


class Recurrence(NamedTuple):
    """A network that processes a sequence position by position, with a carry of fixed size.

    It is for inference only. Its outputs equal those of `Model.apply` for the whole sequence: at
    the last position if the model has one output per sequence, else at every position.
    """

    start: Callable[[int], PyTree]
    """`start(examples) -> carry`: the carry before the first position, `float32[examples, ...]`."""

    step: Callable[
        [PyTree, PyTree, PyTree, Shaped[Array, "examples ..."]],
        tuple[Float32[Array, "examples ..."], PyTree],
    ]
    """`step(params, model_state, carry, inputs) -> (outputs, carry)`.

    `inputs` are those of one position.
    """


class Model(NamedTuple):
    """The interface between a network and the trainer.

    Examples:
        >>> def init(key, inputs):
        ...     return {"kernel": jax.numpy.zeros((inputs.shape[1], 10))}, {}
        >>> def apply(params, model_state, inputs, key, mask=None):
        ...     return inputs @ params["kernel"], model_state
        >>> model = ctde.models.Model(init, apply)
    """

    init: Callable[[Key[Array, ""], Shaped[Array, "examples ..."]], tuple[PyTree, PyTree]]
    """`init(key, inputs) -> (params, model_state)`.

    `inputs` holds some of the training examples. Most models use only its shape; data-dependent
    initialization uses its values.
    """

    apply: Callable[..., tuple[PyTree, PyTree]]
    """`apply(params, model_state, inputs, key, mask=None) -> (outputs, model_state)`.

    `inputs` is `[examples, ...]`. Outputs are an array or a pytree of arrays: floats in float32,
    other dtypes unchanged.

    If a key is passed, the model is in training: dropout uses the key, and batch statistics are
    computed. If `key` is None, the model is in inference: the outputs of an example depend on its
    inputs alone, not on the other examples, and the state is returned unchanged.

    `mask` is `bool[examples]`, False for examples that are repeated to fill a short batch and must
    not count in batch statistics. It is passed only in training, and only if the model has a state.
    """

    layers: Callable[[PyTree, PyTree, jax.Array], OrderedDict[KeyPath, PyTree]] | None = None
    """`layers(params, model_state, inputs) -> {path: output}`.

    Returns the output in inference of each layer with parameters that are not those of its
    sublayers, if it consists of arrays. A path leads to the layer's subtree of `params`. The order
    is that in which the calls end; if a layer is called more than once, its first output is
    returned. Layers of a recurrent cell, which run once per position, are left out. The field is
    None if a model does not expose its layers.
    """

    stream: Recurrence | None = None
    """The model for position-by-position inference, if the network supports it."""

    unscaled: "Unscaled | None" = None
    """The model before `with_raw_inputs` wrapped it; None if this model was not wrapped."""


class Unscaled(NamedTuple):
    """A model before `with_raw_inputs`, and the parts of the wrapped model."""

    model: Model
    shift: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike
    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[PyTree, PyTree]]


def unscaled(model: Model) -> Model:
    """Returns the model before `with_raw_inputs`, or the model itself if it was not wrapped.

    Raises:
        InputError: If the model was changed after wrapping, so that inputs would be scaled twice.
    """
    if model.unscaled is None:
        return model
    # A wrapped model changed by `_replace` keeps this field, although `before` lacks the change.
    before = model.unscaled
    if (model.init, model.apply) != (before.init, before.apply):
        raise InputError(
            "model",
            "must not be derived from the model of a Trained, which already scales its inputs; "
            "change the model that was passed to fit, and pass init_from=trained to start from the "
            "trained parameters.",
        )
    return before.model


def with_raw_inputs(
    model: Model, shift: jax.typing.ArrayLike, scale: jax.typing.ArrayLike
) -> Model:
    """Wraps a model so that it takes stored inputs and computes on `(inputs - shift) * scale`.

    Inputs `[examples, ...]` are converted to the dtype of `scale`; `shift` and `scale` are scalars
    or `[1, ...]`. Tokens have an integer scale of 1, and stay integers. If `scale` is not a scalar,
    the wrapped model has no `stream`.

    Examples:
        >>> model = ctde.models.with_raw_inputs(ctde.models.mlp([64, 10]), shift=0.0, scale=1 / 255)
        >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 8, 8), np.uint8))
    """

    def normalize(inputs):
        return (jnp.asarray(inputs, jnp.result_type(scale)) - shift) * scale

    # A scale per feature has the shape of a whole example, and not of one position.
    layers = model.layers
    stream = None if jnp.ndim(scale) else model.stream

    def init(key, inputs):
        return model.init(key, normalize(inputs))

    # `*mask` is empty unless a mask was passed, as a model without state need not accept one.
    def apply(params, model_state, inputs, key, *mask):
        return model.apply(params, model_state, normalize(inputs), key, *mask)

    # If the model has no layers or no stream, neither has the wrapped one.
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
        unscaled=Unscaled(model, shift, scale, init, apply),
    )


def in_units(model: Model, mean: jax.typing.ArrayLike, deviation: jax.typing.ArrayLike) -> Model:
    """Wraps a model so that its outputs are `outputs * deviation + mean`.

    Args:
        model: Model with standardized outputs, `float32[examples, targets]`. It may be the result
            of `with_raw_inputs`.
        mean: Mean of each target, `float32[1, targets]`.
        deviation: Standard deviation of each target, `float32[1, targets]`.

    Examples:
        >>> mean, deviation = np.float32([[1]]), np.float32([[2]])
        >>> model = ctde.models.in_units(ctde.models.mlp([64, 1]), mean, deviation)
    """

    # Outputs of another shape are refused when a training is created; see `trainer/checks.py`.
    def convert(outputs):
        return jax.tree.map(
            lambda leaf: leaf * deviation + mean if leaf.shape[1:] == jnp.shape(mean)[1:] else leaf,
            outputs,
        )

    def apply(params, model_state, inputs, key, *mask):
        outputs, model_state = model.apply(params, model_state, inputs, key, *mask)
        return convert(outputs), model_state

    def step(params, model_state, carry, inputs):
        assert model.stream is not None
        outputs, carry = model.stream.step(params, model_state, carry, inputs)
        return convert(outputs), carry

    # A model from `with_raw_inputs` keeps the model before it, for `unscaled`.
    before = model.unscaled
    return model._replace(
        apply=apply,
        stream=model.stream and model.stream._replace(step=step),
        unscaled=before and before._replace(apply=apply),
    )


def in_bfloat16(model: Model) -> Model:
    """Wraps a model so that it computes in bfloat16; parameters, state and outputs stay float32.

    Parameters and floating-point inputs are cast before the model is applied, and gradients are
    float32.

    Examples:
        >>> model = ctde.models.in_bfloat16(ctde.models.mlp([64, 10]))
        >>> inputs = np.ones((1, 64), np.float32)
        >>> params, model_state = model.init(jax.random.key(0), inputs)
        >>> outputs, _ = model.apply(params, model_state, inputs, None)
        >>> outputs.dtype
        dtype('float32')
    """

    # The cast of the parameters is differentiated, too, so gradients are float32. Running averages
    # in the state stay float32: bfloat16 would lose their small updates.
    def apply(params, model_state, inputs, key, *mask):
        outputs, model_state = model.apply(_cast(params), model_state, _cast(inputs), key, *mask)
        return as_outputs(outputs), model_state

    layers = model.layers
    stream = model.stream
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
    """Converts the outputs of a network to arrays: floats in float32, other dtypes unchanged.

    Raises:
        InputError: If the network returns nothing, or something other than arrays.
    """
    # A class that is not registered as a pytree is itself a leaf.
    for leaf in jax.tree.leaves(outputs):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            kind = type(leaf).__name__
            raise InputError(
                "model",
                f"must return an array or a pytree of arrays, got {kind}; register a dataclass as "
                "a pytree, for example with flax.struct.dataclass.",
            )

    # None, and an empty container, are pytrees without leaves.
    if not jax.tree.leaves(outputs):
        raise InputError(
            "model",
            f"must return an array, got {outputs!r:.40}; end __call__ with a return statement.",
        )
    return jax.tree.map(_as_output, outputs)


def are_arrays(outputs: PyTree) -> bool:
    """Returns whether all leaves of a tree are JAX arrays, traced or not."""
    return all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(outputs))


def _as_output(leaf: jax.typing.ArrayLike) -> jax.Array:
    # Outputs such as predicted tokens stay integers.
    array = jnp.asarray(leaf)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def count_params(params: PyTree) -> int:
    """Returns the number of parameters, counted as array elements.

    Examples:
        >>> ctde.models.count_params({"kernel": np.ones((64, 10)), "bias": np.ones(10)})
        650
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cast(tree: PyTree) -> PyTree:
    # Integers stay as they are: bfloat16 represents them exactly only up to 256.
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
