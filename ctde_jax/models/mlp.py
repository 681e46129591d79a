"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
from flax import nnx
from jax import numpy as jnp

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
        self, widths: Sequence[int], activation: Callable[[jax.Array], jax.Array], *, rngs: nnx.Rngs
    ):
        self.layers = nnx.List([Linear(i, o, rngs=rngs) for i, o in pairwise(widths)])
        self.activation = activation

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[examples, ...]` to `[examples, widths[-1]]`."""
        x = inputs.reshape(inputs.shape[0], -1)
        # The constructor cannot check this, because it does not receive the shape of an input.
        if x.shape[1] != self.layers[0].in_features:
            width = self.layers[0].in_features
            raise InputError(
                "widths", f"must start with the {x.shape[1]} numbers of an input, got {width}."
            )
        # The last layer has no activation: it returns logits.
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def mlp(widths: Sequence[int], activation: str = "tanh") -> Model:
    """Builds an MLP with these widths, such as `mlp([784, 128, 10])`.

    Args:
        widths: Size of a flattened input, of each hidden layer, and number of classes.
        activation: One of `ACTIVATIONS`.

    Raises:
        InputError: The activation is not known, there are fewer than two widths, or a width is less
            than 1.
    """
    if len(widths) < 2:
        raise InputError(
            "widths", f"must name at least those of the input and the output, got {list(widths)}."
        )
    check_at_least(1, widths=min(widths))
    check_known("activation", activation, ACTIVATIONS)
    return from_nnx(lambda rngs: MLP(widths, ACTIVATIONS[activation], rngs=rngs))
