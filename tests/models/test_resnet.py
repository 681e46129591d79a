"""The residual network: zero-initialized blocks, stages that halve the size, and its norms."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError
from ctde_jax.models.resnet import Block


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_block_with_a_zero_last_convolution_is_the_identity(norm, key):
    block = Block(8, 8, 1, norm, rngs=nnx.Rngs(0))
    block.second.kernel[...] = jnp.zeros_like(block.second.kernel[...])
    x = jax.random.normal(key, (2, 4, 4, 8))
    np.testing.assert_array_equal(block(x), x)


@pytest.mark.parametrize(("side", "halved"), [(8, 4), (7, 4), (2, 1)])
def test_block_with_a_stride_halves_the_image(side, halved):
    block = Block(8, 16, 2, "group", rngs=nnx.Rngs(0))
    assert jax.eval_shape(block, jnp.ones((1, side, side, 8))).shape == (1, halved, halved, 16)


def test_block_equals_its_formula(key):
    """Norm, ReLU, convolution, twice; if the shape changes, the shortcut follows the first ReLU."""
    block = Block(8, 16, 2, "group", rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (2, 6, 6, 8))

    def active(x):
        grouped = x.reshape(2, -1, 8, x.shape[-1] // 8)
        mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        return nnx.relu(((grouped - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape))

    def convolve(x, kernel, stride):
        return jax.lax.conv_general_dilated(
            x, kernel[...], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    inner = convolve(active(convolve(active(x), block.first.kernel, 2)), block.second.kernel, 1)
    expected = convolve(active(x), block.shortcut.kernel, 2) + inner
    np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norm", "couples"), [("group", False), ("batch", True)])
def test_only_batch_normalization_couples_training_examples(norm, couples, key):
    model = models.resnet((4, 4), 3, (8,), norm=norm)
    images = jax.random.normal(key, (4, 4, 4))
    params, model_state = jax.jit(model.init)(key, images)

    apply = jax.jit(model.apply)
    together, state_after = apply(params, model_state, images, key)
    alone, _ = apply(params, model_state, images[:2], key)

    assert (np.abs(together[:2] - alone).max() > 1e-3) == couples
    assert bool(jax.tree.leaves(state_after)) == couples


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channels": ()}, "channels must contain at least one stage, got none."),
        (
            {"channels": (16, 20)},
            "channels must be multiples of the 8 groups of group normalization, got 20.",
        ),
        ({"channels": (16, 0)}, "channels must be at least 1, got 0."),
        ({"blocks": 0}, "blocks must be at least 1, got 0."),
        ({"norm": "bach"}, "norm must be one of group, batch, got 'bach'; did you mean 'batch'?"),
        (
            {"channels": (8, 8, 8, 8, 8)},
            "image_shape must have at least 16 x 16 pixels for 4 halvings, got 8 x 8.",
        ),
        (
            {"image_shape": (64,)},
            "image_shape must be (height, width) or (height, width, channels), got (64,)",
        ),
    ],
)
def test_invalid_network_is_refused(options, sentence):
    with pytest.raises(InputError) as caught:
        models.resnet(**{"image_shape": (8, 8), "classes": 10, **options})
    assert sentence in str(caught.value)
