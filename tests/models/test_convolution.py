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
