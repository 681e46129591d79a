"""A dense layer to few outputs, such as classes, whose gradient is fast on a CPU, where fake devices train.

The gradient of its kernel is a tall and narrow product, `inputs.T @ grads`, which XLA's CPU library takes two to eight
times as long for as for the same product the other way round, `(grads.T @ inputs).T`.
"""

from typing import Any

import jax
from flax import nnx
from jax import lax

_FEW = 32
"""Outputs up to which that was faster in all shapes tried: 16 to 4,096 examples, 128 and 512 inputs."""


class Linear(nnx.Linear):
    """An `nnx.Linear` from `[..., inputs]` to `[..., outputs]`."""

    def __init__(self, in_features: int, out_features: int, use_bias: bool = True, *, rngs: nnx.Rngs):
        product = multiply if out_features <= _FEW else lax.dot_general
        super().__init__(in_features, out_features, use_bias=use_bias, dot_general=product, rngs=rngs)


def multiply(inputs: jax.Array, kernel: jax.Array, *numbers: Any, **options: Any) -> jax.Array:
    """Multiplies `[..., inputs]` by `[inputs, outputs]`, as `lax.dot_general` does.

    Args:
        inputs: Of any number of axes.
        kernel: Of the same type.
        *numbers: What else flax gives to that function, which is always the same here.
        **options: Likewise.
    """
    return _multiply(inputs, kernel)


@jax.custom_vjp
def _multiply(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return inputs @ kernel


def _forward(inputs, kernel):
    return inputs @ kernel, (inputs, kernel)


def _backward(seen, grads):
    inputs, kernel = seen
    rows, grads_of_rows = inputs.reshape(-1, inputs.shape[-1]), grads.reshape(-1, grads.shape[-1])

    def on_cpu(rows: jax.Array, grads: jax.Array) -> jax.Array:
        across = lax.optimization_barrier(grads.T)  # else XLA puts it back the usual way
        return lax.optimization_barrier(across @ rows).T

    def elsewhere(rows: jax.Array, grads: jax.Array) -> jax.Array:
        return rows.T @ grads

    return grads @ kernel.T, lax.platform_dependent(rows, grads_of_rows, cpu=on_cpu, default=elsewhere)


_multiply.defvjp(_forward, _backward)
