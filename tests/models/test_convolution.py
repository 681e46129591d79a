"""The convolution with custom gradients equals that of flax."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from ctde_jax.models import convolution
from ctde_jax.models.convolution import Conv


@pytest.mark.parametrize("strides", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
@pytest.mark.parametrize(("sides", "cache"), [((7, 9), 2**23), ((8, 6), 4000)])
def test_convolution_and_its_gradients_are_those_of_flax(
    key, sides, cache, size, strides, monkeypatch
):
    """Equal parameters, outputs and gradients, also under vmap, and for 3 images in groups of 2."""
    monkeypatch.setattr(convolution, "_CACHE", cache)
    images = jax.random.normal(key, (2, 3, *sides, 4))
    custom, reference = (
        kind(4, 6, size, strides=strides, rngs=nnx.Rngs(0)) for kind in (Conv, nnx.Conv)
    )

    def outputs_and_grads(layer):
        graph, params = nnx.split(layer)

        def outputs(params, images):
            return jax.vmap(nnx.merge(graph, params))(images)

        def loss(params, images):
            return jnp.sin(outputs(params, images)).sum()

        return outputs(params, images), *jax.jit(jax.grad(loss, (0, 1)))(params, images)

    found, right = outputs_and_grads(custom), outputs_and_grads(reference)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, right)


def test_cpu_program_has_only_channels_last_convolutions(key):
    """Channels-last on a CPU; other platforms lower convolutions as JAX does."""
    layer = Conv(3, 2, (3, 3), rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    grads = jax.grad(lambda params, x: jnp.sin(nnx.merge(graph, params)(x)).sum(), (0, 1))
    traced = jax.jit(grads).trace(params, jnp.zeros((2, 8, 8, 3)))

    def layouts(platform: str) -> set[str]:
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"dim_numbers = (.*?), window", program))

    assert layouts("cpu") == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert len(layouts("tpu")) > 1


@pytest.mark.parametrize("strides", [1, 2])
def test_vmap_over_kernels_equals_each_kernel_alone(key, strides):
    """Outputs and gradients of 3 replicas, with their own images of 2 shards and with shared ones.

    The shards of a replica are mapped inside, over images of one kernel.
    """
    images = jax.random.normal(key, (3, 2, 4, 7, 9, 2))
    layers = nnx.vmap(lambda key: Conv(2, 3, (3, 3), strides=strides, rngs=nnx.Rngs(key)))(
        jax.random.split(key, 3)
    )
    graph, params = nnx.split(layers)

    def loss(params, images):
        return jnp.sin(jax.vmap(nnx.merge(graph, params))(images)).sum()

    def of_one(params, images):
        return jax.value_and_grad(loss, (0, 1))(params, images)

    for axis, each in ((0, images), (None, [images[0]] * 3)):
        found = jax.jit(jax.vmap(of_one, (0, axis)))(params, images if axis == 0 else images[0])
        right = [
            of_one(jax.tree.map(lambda x, row=row: x[row], params), each[row]) for row in range(3)
        ]
        jax.tree.map(
            lambda x, *rows: np.testing.assert_allclose(x, rows, rtol=1e-4, atol=1e-4),
            found,
            *right,
        )


def test_cpu_program_of_replicas_has_no_grouped_convolutions(key):
    """On a CPU, kernels are taken one after another; other platforms group them."""
    layers = nnx.vmap(lambda key: Conv(3, 2, (3, 3), rngs=nnx.Rngs(key)))(jax.random.split(key, 4))
    graph, params = nnx.split(layers)
    grads = jax.grad(lambda params, x: jnp.sin(nnx.merge(graph, params)(x)).sum(), (0, 1))
    traced = jax.jit(jax.vmap(grads)).trace(params, jnp.zeros((4, 2, 8, 8, 3)))

    def groups(platform: str) -> set[str]:
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"(?:feature|batch)_group_count = (\d+)", program))

    assert groups("cpu") == {"1"}
    assert "4" in groups("tpu")
