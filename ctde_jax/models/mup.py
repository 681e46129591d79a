"""The maximal update parametrization: learning rates that are tuned on a narrow network hold for a wide one.

The model is compared with the same network at a base width, at which nothing changes. A kernel whose inputs grow with
the width is hidden where its outputs grow as well, and output-like where they do not. All else is input-like: the
first kernel, embeddings, biases and norms. For Adam (Yang et al., 2022, Table 3), with r times the inputs of the base:

| | deviation at the start | learning rate |
|---|---|---|
| input-like | as at base | as at base |
| hidden | divided by sqrt(r) | divided by r |
| output-like | divided by r | divided by r |

Attention needs logits divided by the width of a head rather than its square root, where that width grows. Here it does
not: widen a transformer by more heads of the same width.
"""

from collections.abc import Callable

import jax
import optax
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.base import KeyPath, Model
from ctde_jax.models.initializers import find_kernels, leaves_with_path, map_with_path


def mup(model: Model, base: Model) -> Model:
    """Gives a model the start of the parametrization.

    A parameter is drawn as the model draws it, and brought to the size, its root mean square, that it has to have.

    Args:
        model: The network that is trained.
        base: The same network at the width for which learning rates were tuned.

    Raises:
        InputError: When parameters are first made: the two differ in more than width.
    """

    def init(key, inputs):
        params, model_state = model.init(key, inputs)
        at_base, _ = base.init(key, inputs)
        find_growth = _compare(params, at_base)

        def resize(path: KeyPath, leaf: jax.Array, same: jax.Array) -> jax.Array:
            if leaf.shape == same.shape:
                return leaf
            in_growth, out_growth = find_growth(path)
            wanted = _size(same) / (in_growth**0.5 if out_growth > 1 else in_growth)
            return leaf * jnp.where(wanted > 0, wanted / _size(leaf), 1)

        return map_with_path(resize, params, at_base), model_state

    return model._replace(init=init)


def scale_learning_rates(base: Model, inputs: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Divides the updates of hidden and output-like kernels by how many times more inputs they have than at base.

    It is chained after an optimizer of Adam's family, whose updates have the learning rate's size whatever the
    gradient's: `optax.chain(optax.adam(0.01), scale_learning_rates(base, inputs))`. Decoupled weight decay, which is
    in units of the learning rate, is divided with it.

    Args:
        base: The same network at the width for which the learning rate was tuned.
        inputs: One of the training examples or more, `[examples, ...]`; only their shape is read.
    """
    at_base, _ = jax.eval_shape(base.init, jax.eval_shape(jax.random.key, 0), inputs)

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        find_growth = _compare(updates, at_base)
        return map_with_path(lambda path, update: update / find_growth(path)[0], updates)

    return optax.stateless(scale)


def _compare(params: PyTree, at_base: PyTree) -> Callable[[KeyPath], tuple[float, float]]:
    """Makes the function from a parameter's path to how many times more inputs and outputs it has than at base."""
    if _layout(params) != _layout(at_base):
        raise InputError(
            "base",
            "must be the same network as the model in all but its width, of the same depth too.",
        )
    kernels, at_base = find_kernels(params), find_kernels(at_base)

    def find_growth(path: KeyPath) -> tuple[float, float]:
        if path[-1] != "kernel" or path[:-1] not in kernels:
            return 1.0, 1.0
        kernel, base = kernels[path[:-1]], at_base[path[:-1]]
        return kernel.inputs / base.inputs, kernel.outputs / base.outputs

    return find_growth


def _layout(params: PyTree) -> list[tuple[KeyPath, int]]:
    return [(path, leaf.ndim) for path, leaf in leaves_with_path(params)]


def _size(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(leaf**2))
