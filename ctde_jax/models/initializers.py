"""How weights start: each initializer takes a model and returns it with another `init`.

It finds what it draws anew by path and shape, so it works for every module of nnx or linen. A kernel is a parameter of
that name and of rank 2 or more, `[..., inputs, outputs]`. Biases beside kernels start at zero. All else, such as
embeddings, which are looked up and not multiplied with, and norms, starts as the module says.
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
"""`draw(key, [*taps, inputs, outputs])`, as the functions of `jax.nn.initializers` do."""

BRANCH_ENDS = ("mix", "contract", "second")
"""The layers with which the residual branches end, in a list named `blocks`: here and in a module of your own."""

RECURRENT: dict[Hashable, str] = {
    "dense_h": "dense_i",
    "h": "i",
    **dict.fromkeys(("hi", "hf", "hg", "ho"), "ii"),
    **dict.fromkeys(("hr", "hz", "hn"), "ir"),
}
"""The layers of flax's cells that read the cell's own last output, and one beside each that reads the input.

`dense_h` and `dense_i` compute all gates at once, the others one each.
"""


def initialize(model: Model, name: str) -> Model:
    """Gives a model the start of this name, one of `INITIALIZERS`.

    Raises:
        InputError: The name is not known; or, when parameters are first made, it does not suit the model.
    """
    check_known("init", name, INITIALIZERS)
    return INITIALIZERS[name](model)


def flax(model: Model) -> Model:
    """Leaves the start as the module has it: in flax, where nothing else is said, a variance of 1 / inputs."""
    return model


def glorot(model: Model) -> Model:
    """Keeps variances between layers, forward and backward: 2 / (inputs + outputs) (Glorot and Bengio, 2010)."""
    return _draw_kernels(model, lambda kernel: nn.initializers.glorot_uniform())


def he(model: Model) -> Model:
    """Makes up for the half that a ReLU cuts off: a variance of 2 / inputs (He et al., 2015)."""
    return _draw_kernels(model, lambda kernel: nn.initializers.he_normal())


def orthogonal(model: Model) -> Model:
    """Keeps lengths from layer to layer: orthonormal rows or columns, whichever are fewer (Saxe et al., 2014).

    The taps of a convolution count as inputs.
    """
    return _draw_kernels(model, lambda kernel: nn.initializers.orthogonal())


def delta_orthogonal(model: Model) -> Model:
    """Lets a convolution start as an orthogonal matrix at every place: its other taps are zero (Xiao et al., 2018).

    The paper has at least as many outputs as inputs, and lengths are kept; with fewer outputs, as in any matrix, it is
    the columns that are orthonormal. Dense layers are orthogonal.

    Raises:
        InputError: The model has no convolution.
    """

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        center = tuple((taps - 1) // 2 for taps in shape[:-2])
        return jnp.zeros(shape).at[center].set(nn.initializers.orthogonal()(key, shape[-2:]))

    def check(kernels: dict[KeyPath, Kernel]) -> None:
        if not any(kernel.taps for kernel in kernels.values()):
            raise InputError(
                "init",
                "must not be delta_orthogonal for a model without a convolution; try orthogonal.",
            )

    return _draw_kernels(model, lambda kernel: draw, check)


def recurrent(model: Model) -> Model:
    """Lets a recurrent network remember: the matrix of each gate from state to state is orthogonal (Le et al., 2015).

    An LSTM's forget gates have a bias of 1, so that they start open (Jozefowicz et al., 2015). All other kernels are
    drawn as by `glorot`.

    Raises:
        InputError: The model has no recurrent cell that is known by the names in `RECURRENT`.
    """

    def check(kernels: dict[KeyPath, Kernel]) -> None:
        if not any(kernel.recurrent for kernel in kernels.values()):
            raise InputError(
                "init",
                "must not be recurrent for a model without a recurrent cell; try orthogonal.",
            )

    def draw(kernel: Kernel) -> Draw:
        return (
            nn.initializers.orthogonal() if kernel.recurrent else nn.initializers.glorot_uniform()
        )

    drawn = _draw_kernels(model, draw, check)

    def init(key, inputs):
        params, model_state = drawn.init(key, inputs)
        kernels = find_kernels(params)

        def open_forget_gate(path: KeyPath, leaf: jax.Array) -> jax.Array:
            kernel = kernels.get(path[:-1])
            if path[-1] != "bias" or kernel is None or not kernel.recurrent:
                return leaf
            if kernel.gates == 4:  # flax's order: input, forget, cell, output
                return leaf.at[kernel.outputs : 2 * kernel.outputs].set(1)
            return jnp.ones_like(leaf) if path[-2] == "hf" else leaf

        return map_with_path(open_forget_gate, params), model_state

    return model._replace(init=init)


def residual(model: Model) -> Model:
    """Lets every residual block start as its shortcut, mostly the identity: the last layer of each branch is zero.

    So the scale at the start is that of any depth (Goyal et al., 2017; Zhang et al., 2019; Bachlechner et al., 2020).
    All else starts as the module says.

    Raises:
        InputError: The model has no list named `blocks` with layers named as in `BRANCH_ENDS`.
    """

    def ends_branch(path: KeyPath) -> bool:
        return "blocks" in path[:-2] and path[-2] in BRANCH_ENDS

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        if not any(ends_branch(path) for path, _ in leaves_with_path(params)):
            raise InputError(
                "init",
                "must not be residual for a model without residual branches, which are found in a list named blocks "
                f"by the names of their last layers, {', '.join(BRANCH_ENDS)}.",
            )
        closed = map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if ends_branch(path) else leaf, params
        )
        return closed, model_state

    return model._replace(init=init)


def lsuv(model: Model) -> Model:
    """Gives each layer's output a variance of one on the inputs at hand (Mishkin and Matas, 2016).

    Kernels start orthogonal. One after the other, in the order of execution, they are divided by the deviation of what
    their layer says, which is exact as biases are zero. That takes one pass through the network for each layer. Layers
    of recurrent cells stay orthogonal.

    Raises:
        InputError: The model does not show its layers.
    """
    layers, drawn = model.layers, orthogonal(model)
    if layers is None:
        raise InputError(
            "init", "must not be lsuv for a model that does not show its layers; try orthogonal."
        )

    def init(key, inputs):
        params, model_state = drawn.init(key, inputs)
        paths = list(jax.eval_shape(layers, params, model_state, inputs))

        def divide(i: jax.Array, params: PyTree) -> PyTree:
            spoken = layers(params, model_state, inputs).values()
            deviation = jnp.stack([outputs.astype(jnp.float32).std() for outputs in spoken])[i]
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
    """What a kernel is: for each gate, and at each tap of a convolution, a matrix from inputs to outputs."""

    taps: tuple[int, ...]
    """The extent of a convolution; empty for a dense layer."""

    inputs: int
    outputs: int
    """Of one gate."""

    gates: int = 1
    """How many matrices lie side by side along the outputs; 1 outside of recurrent cells."""

    recurrent: bool = False
    """Whether its inputs are a cell's own last outputs."""

    def draw(self, draw: Draw, key: jax.Array) -> jax.Array:
        """Draws every gate by itself: `[*taps, inputs, gates * outputs]`."""
        shape = (*self.taps, self.inputs, self.outputs)
        return jnp.concatenate(
            [draw(gate_key, shape) for gate_key in jax.random.split(key, self.gates)], axis=-1
        )


def find_kernels(params: PyTree) -> dict[KeyPath, Kernel]:
    """Finds the kernels among the parameters, by the path of their layer."""
    leaves = leaves_with_path(params)
    shapes = {
        path[:-1]: leaf.shape for path, leaf in leaves if path[-1:] == ("kernel",) and leaf.ndim > 1
    }
    return {path: _kernel(path, shapes) for path in shapes}


def _kernel(path: KeyPath, shapes: dict[KeyPath, tuple[int, ...]]) -> Kernel:
    shape, name = shapes[path], path[-1] if path else None

    def beside(name: Hashable) -> KeyPath:
        return (*path[:-1], name)

    in_attention = len(shape) == 3 and all(
        beside(name) in shapes for name in ("query", "key", "value")
    )
    if in_attention and name in ("query", "key", "value"):  # [inputs, heads, width of a head]
        return Kernel((), shape[0], shape[1] * shape[2])
    if in_attention and name == "out":  # [heads, width of a head, outputs]
        return Kernel((), shape[0] * shape[1], shape[2])

    *taps, inputs, outputs = shape
    recurrent = beside(RECURRENT.get(name)) in shapes
    state = path if recurrent else beside("dense_h") if name == "dense_i" else None
    width = shapes[state][-2] if state in shapes else outputs
    return Kernel(tuple(taps), inputs, width, outputs // width, recurrent)


def leaves_with_path(params: PyTree) -> list[tuple[KeyPath, jax.Array]]:
    """Lists leaves with the names that lead to them."""
    return [(_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def map_with_path(function: Callable[..., jax.Array], *trees: PyTree) -> PyTree:
    """Maps the names that lead to a leaf, and the leaf of each tree there."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_names(path), *leaves), *trees
    )


def _draw_kernels(
    model: Model,
    choose: Callable[[Kernel], Draw],
    check: Callable[[dict[KeyPath, Kernel]], None] = lambda kernels: None,
) -> Model:
    """Draws kernels anew, each from a key of its own, and sets the biases beside them to zero."""

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        kernels = find_kernels(params)
        check(kernels)
        keys = dict(
            zip(kernels, jax.random.split(jax.random.fold_in(key, 1), len(kernels)), strict=True)
        )

        def draw(path: KeyPath, leaf: jax.Array) -> jax.Array:
            layer = path[:-1]
            if layer not in kernels or path[-1] not in ("kernel", "bias"):
                return leaf
            if path[-1] == "bias":
                return jnp.zeros_like(leaf)
            return (
                kernels[layer]
                .draw(choose(kernels[layer]), keys[layer])
                .reshape(leaf.shape)
                .astype(leaf.dtype)
            )

        return map_with_path(draw, params), model_state

    return model._replace(init=init)


def _names(path: tuple[Any, ...]) -> KeyPath:
    return tuple(
        getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", None))) for entry in path
    )
