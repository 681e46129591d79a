"""The dense layer with a custom gradient equals that of flax."""

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import nnx
from jax import numpy as jnp

from ctde_jax.models.linear import Linear


def loss_of(layer):
    graph, params = nnx.split(layer)
    return params, lambda params, inputs: jnp.sin(nnx.merge(graph, params)(inputs)).sum()


CASES = [
    (outputs, batch_shape, use_bias)
    for outputs in (1, 10, 33)
    for batch_shape in ((6,), (2, 3), (1,))
    for use_bias in (True, False)
]


@pytest.mark.parametrize(
    "case", some(CASES, (1, (6,), True), (10, (2, 3), True), (33, (1,), False)), ids=str
)
def test_layer_and_its_gradients_are_those_of_flax(key, case):
    """The same parameters, outputs and gradients; also of several batches at once."""
    outputs, batch_shape, use_bias = case
    inputs = jax.random.normal(key, (4, *batch_shape, 7))
    custom, reference = (
        kind(7, outputs, use_bias=use_bias, rngs=nnx.Rngs(0)) for kind in (Linear, nnx.Linear)
    )

    def results(layer):
        params, loss = loss_of(layer)
        grads = jax.vmap(jax.grad(loss, (0, 1)), (None, 0))
        return layer(inputs), *jax.jit(grads)(params, inputs)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        results(custom),
        results(reference),
    )


def test_second_derivatives_are_those_of_flax(key):
    """Products of the Hessian with a direction, forward over reverse and reverse over reverse."""
    inputs = jax.random.normal(key, (5, 7))

    def results(layer):
        params, loss = loss_of(layer)
        grad = jax.grad(loss)
        direction = jax.tree.map(jnp.cos, params)
        _, forward = jax.jvp(lambda params: grad(params, inputs), (params,), (direction,))
        return forward, jax.grad(lambda params: optax.tree.vdot(grad(params, inputs), direction))(
            params
        )

    custom, reference = (results(kind(7, 3, rngs=nnx.Rngs(0))) for kind in (Linear, nnx.Linear))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), custom, reference
    )


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "is_narrow"),
    [(5, 7, 3, True), (136, 132, 33, True), (136, 131, 33, False), (131, 132, 33, False)],
)
def test_cpu_program_transposes_the_gradient_of_narrow_kernels(rows, inputs, outputs, is_narrow):
    """On a CPU, a narrow kernel's gradient has outputs as rows; elsewhere it is as in JAX."""
    params, loss = loss_of(Linear(inputs, outputs, rngs=nnx.Rngs(0)))
    traced = jax.jit(jax.grad(loss)).trace(params, jnp.zeros((rows, inputs)))
    for_cpu, for_tpu = (
        traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")
    )

    def product(*shapes: tuple[int, int]) -> str:
        left, right, result = (f"tensor<{height}x{width}xf32>" for height, width in shapes)
        return f"({left}, {right}) -> {result}"

    narrow = product((outputs, rows), (rows, inputs), (outputs, inputs))
    plain = product((inputs, rows), (rows, outputs), (inputs, outputs))
    assert [form in for_cpu for form in (narrow, plain)] == [is_narrow, not is_narrow]
    assert [form in for_tpu for form in (narrow, plain)] == [False, True]
