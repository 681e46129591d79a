"""Any nnx or linen module becomes a pair of pure functions that compute the same outputs."""

import flax.linen
import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError


class Nnx(nnx.Module):
    """Has all kinds of state: parameters, two random streams of one shape, batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.linear(x))
        return jnp.stack([self.first(jnp.ones_like(x)), self.second(jnp.ones_like(x)), x])


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, deterministic: bool):
        x = flax.linen.Dense(64)(x)
        x = flax.linen.BatchNorm(use_running_average=deterministic)(x)
        return flax.linen.Dropout(0.5, deterministic=deterministic)(x)


MODELS = {
    "mlp": models.mlp([4, 8, 3], "gelu"),
    "nnx": models.from_nnx(Nnx),
    "linen": models.from_linen(Linen()),
    "bfloat16": models.in_bfloat16(models.from_nnx(Nnx)),
    "raw": models.with_raw_inputs(models.from_nnx(Nnx), np.float32(1), np.float32(2)),
}
INPUTS = jax.random.normal(jax.random.key(7), (6, 4))


@pytest.mark.parametrize("name", MODELS)
def test_inference_is_deterministic_and_keeps_the_state(name, key):
    model = MODELS[name]
    params, model_state = model.init(key, INPUTS)

    first, state_after = model.apply(params, model_state, INPUTS, None)
    second, _ = jax.jit(model.apply)(params, model_state, INPUTS, None)

    assert first.dtype == jnp.float32
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state_after, model_state)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mlp"}))
def test_training_uses_the_key_and_updates_the_state(name, key):
    model = MODELS[name]
    params, model_state = model.init(key, INPUTS)

    outputs = [
        model.apply(params, model_state, INPUTS, jax.random.key(seed))[0] for seed in (1, 1, 2)
    ]
    _, state_after = model.apply(params, model_state, INPUTS, key)

    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()
    assert jax.tree.structure(state_after) == jax.tree.structure(model_state)
    assert jax.tree.map(lambda x: x.dtype, state_after) == jax.tree.map(
        lambda x: x.dtype, model_state
    )
    assert any(
        (x != y).any()
        for x, y in zip(*map(jax.tree.leaves, (state_after, model_state)), strict=True)
    )


def test_two_dropout_layers_of_one_module_have_different_masks(key):
    params, model_state = MODELS["nnx"].init(key, INPUTS)
    outputs, _ = MODELS["nnx"].apply(params, model_state, INPUTS, key)
    assert (outputs[0] != outputs[1]).any()


def test_mlp_equals_its_formula(key):
    params, model_state = MODELS["mlp"].init(key, INPUTS)
    first, second = params["layers"][0], params["layers"][1]
    hidden = jax.nn.gelu(INPUTS @ first["kernel"] + first["bias"][None])
    outputs, _ = MODELS["mlp"].apply(params, model_state, INPUTS, None)
    np.testing.assert_allclose(
        outputs, hidden @ second["kernel"] + second["bias"][None], rtol=1e-5, atol=1e-6
    )
    assert models.count_params(params) == 4 * 8 + 8 + 8 * 3 + 3


def test_mlp_flattens_images(key):
    model, images = models.mlp([784, 128, 10]), jnp.ones((2, 28, 28))
    params, model_state = model.init(key, images)
    assert model.apply(params, model_state, images, None)[0].shape == (2, 10)
    assert models.count_params(params) == 101_770


def test_raw_inputs_are_normalized_before_the_model(key):
    model = models.mlp([4, 3])
    raw = models.with_raw_inputs(model, np.float32(100), np.float32(1 / 50))
    pixels = np.arange(24, dtype=np.uint8).reshape(6, 4)
    params, model_state = raw.init(key, pixels)
    expected, _ = model.apply(params, model_state, (pixels.astype(np.float32) - 100) / 50, None)
    np.testing.assert_allclose(raw.apply(params, model_state, pixels, None)[0], expected, rtol=1e-5)


def test_bfloat16_model_has_float32_parameters_and_gradients(key):
    model = models.mlp([4, 64, 3])
    coarse = models.in_bfloat16(model)
    params, model_state = coarse.init(key, INPUTS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    outputs, exact = (m.apply(params, model_state, INPUTS, None)[0] for m in (coarse, model))
    assert 1e-4 < np.abs(outputs - exact).max() < 0.05
    grads = jax.grad(lambda p: coarse.apply(p, model_state, INPUTS, key)[0].sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: models.mlp([4, 3], "tahn"),
            "activation must be one of .* got 'tahn'; did you mean 'tanh'",
        ),
        (
            lambda: models.mlp([64]),
            r"layer_sizes must contain at least the sizes of input and output, got \[64\]",
        ),
        (
            lambda: models.from_nnx(3),
            "module must be an nnx module, or a function that builds one, got 3",
        ),
        (lambda: models.from_linen(Nnx), "module must be a linen module such as"),
        (lambda: models.mlp([4, 0, 3]), "layer_sizes must be at least 1, got 0"),
    ],
)
def test_invalid_network_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()
