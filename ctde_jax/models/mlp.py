"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.models.base import Model
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": nnx.relu,
    "gelu": nnx.gelu,
    "silu": nnx.silu,
}


class MLP(nnx.Module):
    """Dense layers with an activation between them; an input of any shape is flattened."""

    def __init__(
        self,
        layer_sizes: Sequence[int],
        activation: Callable[[jax.Array], jax.Array],
        *,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in pairwise(layer_sizes)])
        self.activation = activation

    def __call__(self, inputs: Float[Array, "examples ..."]) -> Float[Array, "examples classes"]:
        """Flattens each input and maps it to logits."""
        x = inputs.reshape(inputs.shape[0], -1)
        # The constructor cannot check this, because it does not receive the shape of an input.
        if x.shape[1] != self.layers[0].in_features:
            size = self.layers[0].in_features
            raise InputError(
                "layer_sizes",
                f"must start with the size of a flattened input, {x.shape[1]}, got {size}.",
            )
        # The last layer has no activation: it returns logits.
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def mlp(layer_sizes: Sequence[int], activation: str = "tanh") -> Model:
    """Builds an MLP with these layer sizes, such as `mlp([784, 128, 10])`.

    The model flattens inputs `[examples, ...]` and returns logits,
    `float32[examples, layer_sizes[-1]]`.

    Args:
        layer_sizes: Size of a flattened input, sizes of the hidden layers, and number of classes.
        activation: One of `ACTIVATIONS`.

    Raises:
        InputError: The activation is not known, there are fewer than two sizes, or a size is less
            than 1.

    Examples:
        >>> model = ctde.models.mlp([64, 32, 10], activation="relu")
        >>> params, model_state = model.init(jax.random.key(0), np.zeros((1, 64), np.float32))
        >>> ctde.models.count_params(params)
        2410
    """
    if len(layer_sizes) < 2:
        raise InputError(
            "layer_sizes",
            f"must contain at least the sizes of input and output, got {list(layer_sizes)}.",
        )
    check_at_least(1, layer_sizes=min(layer_sizes))
    check_known("activation", activation, ACTIVATIONS)
    return from_nnx(lambda rngs: MLP(layer_sizes, ACTIVATIONS[activation], rngs=rngs))
