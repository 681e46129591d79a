"""Weight initialization: each initializer takes a model and returns it with a different `init`.

Parameters are selected by path and shape, so initializers work for any nnx or linen module. A
kernel is a parameter named `kernel` of rank 2 or more, `[..., inputs, outputs]`. Initializers that
draw kernels set the biases next to them to zero. All other parameters keep the initialization of
the module, such as normalization parameters and embeddings, which are looked up, not multiplied.

As in `jax.nn.initializers`, fan_in is the number of inputs times the number of convolution taps,
and fan_out the number of outputs times the number of taps. In recurrent cells, each gate has a
separate matrix with its fan_in and fan_out.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax import lax, nn
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_known
from ctde_jax.models.base import KeyPath, Model

Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""`draw(key, shape)` with `shape = (*taps, inputs, outputs)`, as in `jax.nn.initializers`."""

BRANCH_ENDS = ("mix", "contract", "second")
"""Names of the last layer of a residual branch in a list named `blocks`, also in user modules."""

RECURRENT: dict[Hashable, str] = {
    "dense_h": "dense_i",
    "h": "i",
    **dict.fromkeys(("hi", "hf", "hg", "ho"), "ii"),
    **dict.fromkeys(("hr", "hz", "hn"), "ir"),
}
"""Layers of flax's cells that read the hidden state, each with a sibling that reads the input.

`dense_h` and `dense_i` compute all gates at once; the other layers compute one gate each.
"""


def initialize(model: Model, name: str) -> Model:
    """Returns the model with the initializer `name`, one of `INITIALIZERS`.

    Raises:
        InputError: The name is not known, or the initializer does not suit the model; the latter
            may be raised only by `init`.

    Examples:
        >>> model = ctde.initializers.initialize(ctde.models.mlp([64, 32, 10], "relu"), "he")
        >>> params, model_state = model.init(jax.random.key(0), np.zeros((1, 64), np.float32))
    """
    check_known("init", name, INITIALIZERS)
    return INITIALIZERS[name](model)


def flax(model: Model) -> Model:
    """Returns the model unchanged, with the initialization of the module.

    The default of flax's dense layers and convolutions is `lecun_normal`, of variance 1 / fan_in.

    Examples:
        >>> model = ctde.initializers.flax(ctde.models.mlp([64, 32, 10]))
    """
    return model


def glorot(model: Model) -> Model:
    """Returns the model with kernels drawn by `glorot_uniform` and zero biases.

    The variance 2 / (fan_in + fan_out) is a compromise between preserving the variance of
    activations and that of gradients from layer to layer (Glorot and Bengio, 2010).

    Examples:
        >>> model = ctde.initializers.glorot(ctde.models.mlp([64, 32, 10], "tanh"))
    """
    return _draw_kernels(model, lambda kernel: nn.initializers.glorot_uniform())


def he(model: Model) -> Model:
    """Returns the model with kernels drawn by `he_normal` and zero biases (He et al., 2015).

    In the variance 2 / fan_in, the factor 2 compensates for the half of the inputs that a ReLU sets
    to zero.

    Examples:
        >>> model = ctde.initializers.he(ctde.models.mlp([64, 32, 10], "relu"))
    """
    return _draw_kernels(model, lambda kernel: nn.initializers.he_normal())


def orthogonal(model: Model) -> Model:
    """Returns the model with orthogonal kernels and zero biases (Saxe et al., 2014).

    A kernel is a matrix `[fan_in, outputs]` with orthonormal rows or columns, whichever are fewer.
    It preserves the norm of its input if `outputs` is at least fan_in.

    Examples:
        >>> model = ctde.initializers.orthogonal(ctde.models.mlp([64, 64, 10]))
    """
    return _draw_kernels(model, lambda kernel: nn.initializers.orthogonal())


def delta_orthogonal(model: Model) -> Model:
    """Returns the model with an orthogonal center tap in each convolution (Xiao et al., 2018).

    All other taps and biases are zero. The paper requires at least as many outputs as inputs, which
    preserves norms; with fewer outputs the columns are orthonormal. Dense layers are orthogonal.

    Raises:
        InputError: The model has no convolution; raised by `init`.

    Examples:
        >>> model = ctde.initializers.delta_orthogonal(ctde.models.cnn((28, 28), classes=10))
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # The earlier of the two middle taps if their number is even.
        center = tuple((taps - 1) // 2 for taps in shape[:-2])
        return jnp.zeros(shape).at[center].set(nn.initializers.orthogonal()(key, shape[-2:]))

    # The kernels are known only once the model is initialized.
    def check(kernels: dict[KeyPath, Kernel]) -> None:
        if not any(kernel.taps for kernel in kernels.values()):
            raise InputError(
                "init",
                "must not be delta_orthogonal for a model without a convolution; use orthogonal.",
            )

    return _draw_kernels(model, lambda kernel: draw, check)


def recurrent(model: Model) -> Model:
    """Returns the model with orthogonal recurrent kernels, one per gate (Le et al., 2015).

    The forget gates of an LSTM have bias 1, so that they start open (Jozefowicz et al., 2015). All
    other kernels are drawn as by `glorot`.

    Raises:
        InputError: The model has no recurrent cell with layers named as in `RECURRENT`; raised by
            `init`.

    Examples:
        >>> model = ctde.initializers.recurrent(ctde.models.rnn_classifier(features=28, classes=10))
    """

    def check(kernels: dict[KeyPath, Kernel]) -> None:
        if not any(kernel.recurrent for kernel in kernels.values()):
            raise InputError(
                "init",
                "must not be recurrent for a model without a recurrent cell; use orthogonal.",
            )

    def draw(kernel: Kernel) -> Draw:
        return (
            nn.initializers.orthogonal() if kernel.recurrent else nn.initializers.glorot_uniform()
        )

    # Draw all kernels and set the biases next to them to zero.
    drawn = _draw_kernels(model, draw, check)

    # Then open the forget gates.
    def init(key, inputs):
        params, model_state = drawn.init(key, inputs)
        kernels = find_kernels(params)

        def open_forget_gate(path: KeyPath, leaf: jax.Array) -> jax.Array:
            kernel = kernels.get(path[:-1])
            if path[-1] != "bias" or kernel is None or not kernel.recurrent:
                return leaf
            # One layer for all gates; flax orders them input, forget, cell, output.
            if kernel.gates == 4:
                return leaf.at[kernel.outputs : 2 * kernel.outputs].set(1)
            # One layer for each gate; only an LSTM has one named `hf`.
            return jnp.ones_like(leaf) if path[-2] == "hf" else leaf

        return map_with_path(open_forget_gate, params), model_state

    return model._replace(init=init)


def residual(model: Model) -> Model:
    """Returns the model with the last layer of each residual branch set to zero.

    A block then equals its shortcut, which is mostly the identity, so the initial scale does not
    depend on the depth (Goyal et al., 2017; Zhang et al., 2019; Bachlechner et al., 2020). All
    other parameters keep the initialization of the module.

    Raises:
        InputError: The model has no list named `blocks` with layers named as in `BRANCH_ENDS`;
            raised by `init`.

    Examples:
        >>> model = ctde.initializers.residual(ctde.models.resnet((32, 32, 3), classes=10))
    """

    def ends_branch(path: KeyPath) -> bool:
        return "blocks" in path[:-2] and path[-2] in BRANCH_ENDS

    def init(key, inputs):
        # Without a branch end this would silently do nothing.
        params, model_state = model.init(key, inputs)
        if not any(ends_branch(path) for path, _ in leaves_with_path(params)):
            raise InputError(
                "init",
                "must not be residual for a model without residual branches, which are elements of "
                "a list named blocks and end in a layer with one of the names "
                f"{', '.join(BRANCH_ENDS)}.",
            )
        closed = map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if ends_branch(path) else leaf, params
        )
        return closed, model_state

    return model._replace(init=init)


def lsuv(model: Model) -> Model:
    """Returns the model with layers scaled to output variance 1 (Mishkin and Matas, 2016).

    Kernels are drawn orthogonal. In the order of execution, each is divided by the standard
    deviation of its layer's output on the inputs of `init`, which is exact because biases are zero.
    This takes one forward pass for each layer. Layers of recurrent cells stay orthogonal.

    Raises:
        InputError: The model does not expose its layers.

    Examples:
        >>> model = ctde.initializers.lsuv(ctde.models.mlp([64, 32, 10], "relu"))
    """
    # Start from orthogonal kernels.
    layers = model.layers
    drawn = orthogonal(model)
    if layers is None:
        raise InputError(
            "init", "must not be lsuv for a model that does not expose its layers; use orthogonal."
        )

    # Then rescale them one by one. The number of the layer is traced, so that the network is
    # compiled once and not once for each layer.
    def init(key, inputs):
        params, model_state = drawn.init(key, inputs)
        # One entry for each layer with a kernel, in the order of execution.
        leaves = {path for path, _ in leaves_with_path(params)}
        listed = jax.eval_shape(layers, params, model_state, inputs)
        paths = [path for path in listed if (*path, "kernel") in leaves]

        def divide(i: jax.Array, params: PyTree) -> PyTree:
            outputs = layers(params, model_state, inputs)
            # bfloat16 would be too coarse for a standard deviation.
            deviation = jnp.stack([outputs[path].astype(jnp.float32).std() for path in paths])[i]
            # A layer with a constant output, such as zero, keeps its kernel.
            divisor = jnp.where(deviation > 0, deviation, 1)

            def divide_layer(path: KeyPath, leaf: jax.Array) -> jax.Array:
                is_kernel = path[-1] == "kernel" and path[:-1] in paths
                return (
                    jnp.where(paths.index(path[:-1]) == i, leaf / divisor, leaf)
                    if is_kernel
                    else leaf
                )

            return map_with_path(divide_layer, params)

        return lax.fori_loop(0, len(paths), divide, params), model_state

    return model._replace(init=init)


INITIALIZERS: dict[str, Callable[[Model], Model]] = {
    "flax": flax,
    "glorot": glorot,
    "he": he,
    "orthogonal": orthogonal,
    "delta_orthogonal": delta_orthogonal,
    "recurrent": recurrent,
    "residual": residual,
    "lsuv": lsuv,
}


class Kernel(NamedTuple):
    """Dimensions of a kernel: one `[inputs, outputs]` matrix per gate and per convolution tap."""

    taps: tuple[int, ...]
    """Spatial size of a convolution; empty for a dense layer."""

    inputs: int
    outputs: int
    """Number of outputs of one gate."""

    gates: int = 1
    """Number of matrices concatenated along the outputs; 1 outside of recurrent cells."""

    recurrent: bool = False
    """Whether the inputs are the hidden state of a recurrent cell."""

    def draw(self, draw: Draw, key: jax.Array) -> jax.Array:
        """Draws each gate with a separate key and returns `[*taps, inputs, gates * outputs]`."""
        shape = (*self.taps, self.inputs, self.outputs)
        return jnp.concatenate(
            [draw(gate_key, shape) for gate_key in jax.random.split(key, self.gates)], axis=-1
        )


def find_kernels(params: PyTree) -> dict[KeyPath, Kernel]:
    """Returns the dimensions of all kernels of rank 2 or more, keyed by the path of their layer."""
    leaves = leaves_with_path(params)
    shapes = {
        path[:-1]: leaf.shape for path, leaf in leaves if path[-1:] == ("kernel",) and leaf.ndim > 1
    }
    return {path: _kernel(path, shapes) for path in shapes}


def _kernel(path: KeyPath, shapes: dict[KeyPath, tuple[int, ...]]) -> Kernel:
    shape = shapes[path]
    name = path[-1] if path else None

    def beside(name: Hashable) -> KeyPath:
        return (*path[:-1], name)

    # Multi-head attention: flax stores kernels of rank 3, in which the heads have a separate axis.
    in_attention = len(shape) == 3 and all(
        beside(name) in shapes for name in ("query", "key", "value")
    )
    if in_attention and name in ("query", "key", "value"):  # [inputs, heads, width of a head]
        return Kernel((), shape[0], shape[1] * shape[2])
    if in_attention and name == "out":  # [heads, width of a head, outputs]
        return Kernel((), shape[0] * shape[1], shape[2])

    # All other layers. The number of inputs of a recurrent kernel is the hidden size of the cell,
    # so a wider layer of the cell computes several gates.
    *taps, inputs, outputs = shape
    recurrent = beside(RECURRENT.get(name)) in shapes
    state = path if recurrent else beside("dense_h") if name == "dense_i" else None
    width = shapes[state][-2] if state in shapes else outputs
    return Kernel(tuple(taps), inputs, width, outputs // width, recurrent)


def leaves_with_path(params: PyTree) -> list[tuple[KeyPath, jax.Array]]:
    """Lists the leaves of a tree, each with its path: dictionary keys, indices or attributes."""
    return [(_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def map_with_path(function: Callable[..., jax.Array], *trees: PyTree) -> PyTree:
    """Maps `function(path, *leaves)` over trees, with paths as in `leaves_with_path`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_names(path), *leaves), *trees
    )


def _draw_kernels(
    model: Model,
    choose: Callable[[Kernel], Draw],
    check: Callable[[dict[KeyPath, Kernel]], None] = lambda kernels: None,
) -> Model:
    """Returns the model with an `init` that redraws all kernels and sets their biases to zero.

    Args:
        model: Model whose other parameters are initialized as before.
        choose: Returns the distribution of a kernel, given its dimensions.
        check: Raises InputError if the initializer does not suit kernels of these dimensions.
    """

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        kernels = find_kernels(params)
        check(kernels)
        # `model.init` has used `key` itself, so the kernels derive their keys from a new one.
        keys = dict(
            zip(kernels, jax.random.split(jax.random.fold_in(key, 1), len(kernels)), strict=True)
        )

        def draw(path: KeyPath, leaf: jax.Array) -> jax.Array:
            layer = path[:-1]
            if layer not in kernels or path[-1] not in ("kernel", "bias"):
                return leaf
            if path[-1] == "bias":
                return jnp.zeros_like(leaf)
            # Attention kernels are drawn as matrices, so the axes of their heads are restored.
            return (
                kernels[layer]
                .draw(choose(kernels[layer]), keys[layer])
                .reshape(leaf.shape)
                .astype(leaf.dtype)
            )

        return map_with_path(draw, params), model_state

    return model._replace(init=init)


def _names(path: tuple[Any, ...]) -> KeyPath:
    # The entries are `DictKey.key`, `SequenceKey.idx` or `GetAttrKey.name` of `jax.tree_util`.
    return tuple(
        getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None))) for entry in path
    )
