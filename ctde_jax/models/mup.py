"""The maximal update parametrization (muP), in which learning rates transfer across widths.

The model is compared with the same network at a base width, for which nothing changes. A kernel
whose inputs grow with the width is hidden if its outputs grow as well, and output-like if they do
not. All other parameters are input-like: the first kernel, embeddings, biases and normalization
parameters. For Adam (Yang et al., 2022, Table 3), with r the ratio of a kernel's inputs to those at
base width:

| | initial standard deviation | learning rate |
|---|---|---|
| input-like | as at base width | as at base width |
| hidden | divided by sqrt(r) | divided by r |
| output-like | divided by r | divided by r |

If the head size grew, attention logits would have to be divided by it rather than by its square
root. Here the head size is fixed: widen a transformer by adding heads of the same size.
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
    """Returns the model with the initialization of muP (Yang et al., 2022).

    Each parameter is drawn by `model.init` and scaled to the root mean square that muP requires.

    Args:
        model: Network to train.
        base: The same network at the width for which the learning rate was tuned.

    Raises:
        InputError: The two networks differ in more than width; raised by `init`.

    Examples:
        >>> base = ctde.models.mlp([64, 32, 10])
        >>> model = ctde.mup.mup(ctde.models.mlp([64, 256, 10]), base)
    """

    def init(key, inputs):
        # The drawn values of the base set the scale, so this works for any initializer.
        params, model_state = model.init(key, inputs)
        at_base, _ = base.init(key, inputs)
        find_growth = _compare(params, at_base)

        def resize(path: KeyPath, leaf: jax.Array, same: jax.Array) -> jax.Array:
            if leaf.shape == same.shape:
                return leaf

            # Hidden kernels shrink with sqrt(r), output-like ones with r; for all else r is 1.
            in_growth, out_growth = find_growth(path)
            wanted = _size(same) / (in_growth**0.5 if out_growth > 1 else in_growth)
            # A parameter that is zero at either width, as biases usually are, is left as it is.
            size = _size(leaf)
            return leaf * jnp.where((wanted > 0) & (size > 0), wanted / jnp.maximum(size, 1e-30), 1)

        return map_with_path(resize, params, at_base), model_state

    return model._replace(init=init)


def scale_learning_rates(base: Model, inputs: jax.typing.ArrayLike) -> optax.GradientTransformation:
    """Divides the updates of hidden and output-like kernels by the growth of their inputs.

    These are the learning rates of muP for Adam (Yang et al., 2022, Table 3).

    Chain it after an optimizer of the Adam family, whose updates do not scale with the gradient:
    `optax.chain(optax.adam(0.01), scale_learning_rates(base, inputs))`. Decoupled weight decay is
    in units of the learning rate, so it is divided as well.

    Args:
        base: The same network at the width for which the learning rate was tuned.
        inputs: One or more training examples, `[examples, ...]`; only the shape is used.

    Raises:
        InputError: The networks differ in more than width; raised by `update`.

    Examples:
        >>> base = ctde.models.mlp([64, 32, 10])
        >>> rates = ctde.mup.scale_learning_rates(base, np.zeros((1, 64), np.float32))
        >>> optimizer = optax.chain(optax.adam(0.01), rates)
    """
    # Trace the base without computing its parameters: only their shapes are needed.
    at_base, _ = jax.eval_shape(base.init, jax.eval_shape(jax.random.key, 0), inputs)

    def scale(updates: PyTree, params: PyTree = None) -> PyTree:
        find_growth = _compare(updates, at_base)
        return map_with_path(lambda path, update: update / find_growth(path)[0], updates)

    return optax.stateless(scale)


def _compare(params: PyTree, at_base: PyTree) -> Callable[[KeyPath], tuple[float, float]]:
    """Returns a function from a parameter's path to the growth of its inputs and outputs.

    The growth is the ratio to the base width, and 1 for all parameters except kernels.

    Raises:
        InputError: If names or numbers of axes of the parameters differ.
    """
    if _layout(params) != _layout(at_base):
        raise InputError(
            "base",
            "must differ from the model only in width, but its parameters have other names or "
            "numbers of axes; build it with the depth of the model.",
        )
    kernels = find_kernels(params)
    at_base = find_kernels(at_base)

    def find_growth(path: KeyPath) -> tuple[float, float]:
        # Biases, norms and embeddings are input-like whatever their size.
        if path[-1] != "kernel" or path[:-1] not in kernels:
            return 1.0, 1.0
        kernel = kernels[path[:-1]]
        base = at_base[path[:-1]]
        return kernel.inputs / base.inputs, kernel.outputs / base.outputs

    return find_growth


def _layout(params: PyTree) -> list[tuple[KeyPath, int]]:
    return [(path, leaf.ndim) for path, leaf in leaves_with_path(params)]


def _size(leaf: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(leaf**2))
