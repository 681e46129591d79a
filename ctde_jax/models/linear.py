"""A dense layer whose gradient is fast on a CPU, where fake devices train.

The gradient of its kernel is the product `inputs.T @ grads`. Where that is tall and narrow, XLA on a CPU is faster with
the same product the other way round, `(grads.T @ inputs).T`: its fast library takes no transposed left side.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax

_FEW = 32
"""Outputs up to which that was faster, by 1.4 to 11 times, in all shapes tried: 16 to 4,096 rows, 128 to 784 inputs.
Here and below, a row is an example or one of its places."""

_PART = 4
"""For more outputs it is done where inputs and rows are both at least so many times as many: of nine shapes of 48 to
512 outputs one was 3 to 9 % slower, the others as fast or up to 1.6 times faster. Elsewhere it went both ways."""


class Linear(nnx.Linear):
    """An `nnx.Linear` from `[..., inputs]` to `[..., outputs]`.

    It has a gradient of its own, so JAX refuses `jax.jvp` of its outputs, though not of its gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, use_bias: bool = True, *, rngs: nnx.Rngs
    ):
        super().__init__(
            in_features, out_features, use_bias=use_bias, dot_general=multiply, rngs=rngs
        )


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

    def plainly(rows: jax.Array, grads: jax.Array) -> jax.Array:
        return rows.T @ grads

    def the_other_way_round(rows: jax.Array, grads: jax.Array) -> jax.Array:
        across = lax.optimization_barrier(grads.T)  # else XLA puts it back the usual way
        return lax.optimization_barrier(across @ rows).T

    outputs, to_kernel = kernel.shape[1], plainly
    if outputs <= _FEW or _PART * outputs <= min(rows.shape):
        to_kernel = partial(lax.platform_dependent, cpu=the_other_way_round, default=plainly)
    return grads @ kernel.T, to_kernel(rows, grads_of_rows)


_multiply.defvjp(_forward, _backward)
