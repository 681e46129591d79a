"""The convolutional network of federated averaging, and the shapes of its inputs."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError


def test_cnn_has_the_parameters_of_the_paper(key):
    params, _ = jax.eval_shape(models.cnn((28, 28, 1), 10).init, key, np.zeros((1, 28, 28, 1)))
    assert models.count_params(params) == 1_663_370


def test_cnn_equals_its_formula(key):
    """Equals pooling by nnx after the ReLU; an odd last row or column is dropped."""
    model, images = models.cnn((9, 6), 3), jax.random.normal(key, (2, 9, 6))
    params, model_state = jax.jit(model.init)(key, images)

    x = images[..., None]
    for layer in (params["first"], params["second"]):
        x = lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nnx.max_pool(nnx.relu(x + layer["bias"][None, None, None]), (2, 2), strides=(2, 2))
    hidden = nnx.relu(
        x.reshape(2, -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]
    )
    expected = hidden @ params["out"]["kernel"] + params["out"]["bias"][None]

    outputs, _ = jax.jit(model.apply)(params, model_state, images, None)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_image_without_a_channel_axis_has_one_channel(key):
    flat, deep = models.cnn((4, 4), 3), models.cnn((4, 4, 1), 3)
    images = jax.random.normal(key, (2, 4, 4))
    params, model_state = jax.jit(flat.init)(key, images)
    outputs = (
        flat.apply(params, model_state, images, None)[0],
        deep.apply(params, model_state, images[..., None], None)[0],
    )
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("image_shape", "options", "sentence"),
    [
        (
            (64,),
            {},
            (
                "image_shape must be (height, width) or (height, width, channels), got (64,); "
                "for other inputs, use an mlp"
            ),
        ),
        (
            (2, 2, 2, 2),
            {},
            "image_shape must be (height, width) or (height, width, channels), got (2, 2, 2, 2)",
        ),
        ((28, 3), {}, "image_shape must have at least 4 x 4 pixels for 2 halvings, got 28 x 3."),
        ((28, 28, 0), {}, "channels must be at least 1, got 0."),
        (
            (28, 28),
            {"dropout_rate": 1.0},
            "dropout_rate must be at least 0 and less than 1, got 1.0.",
        ),
        ((28, 28), {"classes": 0}, "classes must be at least 1, got 0."),
    ],
)
def test_invalid_network_is_refused(image_shape, options, sentence):
    with pytest.raises(InputError) as caught:
        models.cnn(image_shape, **{"classes": 10, **options})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("build", [models.cnn, models.resnet])
@pytest.mark.parametrize("shape", [(784,), (28, 28, 1), (28, 27)])
def test_inputs_of_another_shape_are_refused(build, shape, key):
    model = build((28, 28), 10)
    params, model_state = jax.eval_shape(model.init, key, jnp.zeros((1, 28, 28)))
    with pytest.raises(InputError) as caught:
        jax.eval_shape(model.apply, params, model_state, jnp.zeros((2, *shape)), None)
    assert str(caught.value) == f"image_shape must be the shape of an input, {shape}, got (28, 28)."
