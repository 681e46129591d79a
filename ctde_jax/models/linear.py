"""A dense layer whose gradient is fast on a CPU, on which fake devices train.

The gradient of its kernel is the product `inputs.T @ grads`. If that is tall and narrow, XLA:CPU
computes the equal product `(grads.T @ inputs).T` faster; see `_FEW` and `_PART`.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

_FEW = 32
"""Up to this number of outputs, `(grads.T @ inputs).T` was 1.4 to 11 times faster in all shapes
measured: 16 to 4,096 rows, 128 to 784 inputs. A row is an example or one of its positions."""

_PART = 4
"""With more outputs, `(grads.T @ inputs).T` is used if the inputs and the rows each number at least
`_PART` times the outputs. Of nine such shapes with 48 to 512 outputs, one was 3 to 9 % slower, and
the others were as fast or up to 1.6 times faster. Other shapes gave mixed results."""


class Linear(nnx.Linear):
    """An `nnx.Linear` from `[..., inputs]` to `[..., outputs]`.

    It has a custom VJP, so JAX raises an error for `jax.jvp` of its outputs, though not for
    `jax.jvp` of its gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, use_bias: bool = True, *, rngs: nnx.Rngs
    ):
        super().__init__(
            in_features, out_features, use_bias=use_bias, dot_general=multiply, rngs=rngs
        )


def multiply(
    inputs: Float[Array, "... inputs"],
    kernel: Float[Array, "inputs outputs"],
    *numbers: Any,
    **options: Any,
) -> Float[Array, "... outputs"]:
    """Multiplies inputs by a kernel, as `lax.dot_general` does.

    Args:
        inputs: Inputs of the layer.
        kernel: Kernel of the same dtype.
        *numbers: Dimension numbers from flax, ignored because they are always the same here.
        **options: Other arguments of `lax.dot_general` from flax, ignored for the same reason.
    """
    return _multiply(inputs, kernel)


# Only the gradient of the kernel differs from that of JAX.
@jax.custom_vjp
def _multiply(
    inputs: Float[Array, "... inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "... outputs"]:
    return inputs @ kernel


def _forward(inputs, kernel):
    return inputs @ kernel, (inputs, kernel)


def _backward(seen, grads):
    inputs, kernel = seen
    # The gradient of the kernel sums over all leading axes.
    rows = inputs.reshape(-1, inputs.shape[-1])
    grads_of_rows = grads.reshape(-1, grads.shape[-1])

    def plainly(
        rows: Float[Array, "rows inputs"], grads: Float[Array, "rows outputs"]
    ) -> Float[Array, "inputs outputs"]:
        return rows.T @ grads

    def the_other_way_round(
        rows: Float[Array, "rows inputs"], grads: Float[Array, "rows outputs"]
    ) -> Float[Array, "inputs outputs"]:
        # Without the barriers, XLA rewrites this as the plain product.
        across = lax.optimization_barrier(grads.T)
        return lax.optimization_barrier(across @ rows).T

    # Shapes are static, so one of the products is chosen when the gradient is traced.
    outputs = kernel.shape[1]
    to_kernel = plainly
    if outputs <= _FEW or _PART * outputs <= min(rows.shape):
        to_kernel = partial(lax.platform_dependent, cpu=the_other_way_round, default=plainly)
    return grads @ kernel.T, to_kernel(rows, grads_of_rows)


_multiply.defvjp(_forward, _backward)
