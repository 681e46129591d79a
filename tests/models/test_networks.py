"""The contract of all networks of the package."""

import re
from functools import cache
from math import prod
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.devices.replica import PyTree
from ctde_jax.models import Model


class Case(NamedTuple):
    """A network, its inputs, and its number of parameters."""

    model: Model
    inputs: np.ndarray
    params: int


IMAGES = np.random.default_rng(0).normal(size=(4, 9, 8, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 7, (4, 5)).astype(np.int32)


def resnet_params(channels: int, widths: tuple[int, ...], blocks: int, classes: int) -> int:
    """Counts kernels, norms, and a shortcut of 1 x 1 at each change of the width."""
    total, before = 9 * channels * widths[0], widths[0]
    for stage, width in enumerate(widths):
        for i in range(blocks):
            shortcut = before * width if stage > 0 and i == 0 else 0
            total += 2 * before + 9 * before * width + 2 * width + 9 * width * width + shortcut
            before = width
    return total + 2 * before + before * classes + classes


def transformer_params(vocabulary: int, length: int, width: int, blocks: int) -> int:
    # Attention, perceptron and its biases, two norms.
    block = 4 * width**2 + 8 * width**2 + 5 * width + 4 * width
    return (2 * vocabulary + length) * width + blocks * block + 2 * width


def rnn_params(gates: int, features: int, width: int, layers: int) -> int:
    first, later = ((features + width + 1) * gates * width, (2 * width + 1) * gates * width)
    return first + (layers - 1) * later


CNN_PARAMS = 25 * 3 * 32 + 32 + 25 * 32 * 64 + 64 + 2 * 2 * 64 * 512 + 512 + 512 * 4 + 4
NETWORKS = {
    "mlp": Case(models.mlp([9 * 8 * 3, 4]), IMAGES, 9 * 8 * 3 * 4 + 4),
    "cnn": Case(models.cnn((9, 8, 3), 4, dropout_rate=0.5), IMAGES, CNN_PARAMS),
    "resnet": Case(
        models.resnet((9, 8), 4, (8, 16), 2), IMAGES[..., 0], resnet_params(1, (8, 16), 2, 4)
    ),
    "batch resnet": Case(
        models.resnet((9, 8, 3), 4, (3, 5), norm="batch"), IMAGES, resnet_params(3, (3, 5), 1, 4)
    ),
    "lstm": Case(
        models.rnn_classifier(8, 4, 6), IMAGES[..., 0], rnn_params(4, 8, 6, 1) + 6 * 4 + 4
    ),
    "gru": Case(
        models.rnn_classifier(8, 4, 6, 2, "gru", 0.5),
        IMAGES[..., 0],
        rnn_params(3, 8, 6, 2) + 6 * 4 + 4,
    ),
    "lstm language": Case(
        models.rnn_language_model(7, 6, dropout_rate=0.5),
        TOKENS,
        7 * 6 + rnn_params(4, 6, 6, 2) + 6 * 7 + 7,
    ),
    "gru language": Case(
        models.rnn_language_model(7, 6, 1, "gru", 0.5),
        TOKENS,
        7 * 6 + rnn_params(3, 6, 6, 1) + 6 * 7 + 7,
    ),
    "transformer": Case(
        models.transformer(7, 5, 8, 2, 4, dropout_rate=0.5), TOKENS, transformer_params(7, 5, 8, 2)
    ),
}
WITH_DROPOUT = ["cnn", "gru", "lstm language", "gru language", "transformer"]
WITHOUT_DROPOUT = sorted(set(NETWORKS) - set(WITH_DROPOUT) - {"batch resnet"})


@cache
def initialized(name: str) -> tuple[Model, PyTree, PyTree, np.ndarray]:
    model, inputs, _ = NETWORKS[name]
    return model, *jax.jit(model.init)(jax.random.key(0), inputs), inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_number_of_parameters_is_that_of_the_formula(name):
    params, _ = jax.eval_shape(NETWORKS[name].model.init, jax.random.key(0), NETWORKS[name].inputs)
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(params)) == NETWORKS[name].params


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_inference_is_deterministic_and_the_same_when_compiled(name):
    model, params, model_state, inputs = initialized(name)

    first, state_after = model.apply(params, model_state, inputs, None)
    second, _ = model.apply(params, model_state, inputs, None)
    compiled, _ = jax.jit(model.apply)(params, model_state, inputs, None)

    assert first.dtype == jnp.float32
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, compiled, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state_after, model_state)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_do_not_depend_on_other_examples(name):
    """An example has the same outputs alone, in a batch, and in groups under vmap."""
    model, params, model_state, inputs = initialized(name)
    groups = inputs.reshape(2, 2, *inputs.shape[1:])

    together, _ = jax.jit(model.apply)(params, model_state, inputs, None)
    grouped, _ = jax.jit(jax.vmap(model.apply, in_axes=(None, None, 0, None)))(
        params, model_state, groups, None
    )
    alone, _ = jax.jit(model.apply)(params, model_state, inputs[:1], None)

    np.testing.assert_allclose(grouped.reshape(together.shape), together, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_depends_on_the_key(name):
    model, params, model_state, inputs = initialized(name)
    apply = jax.jit(model.apply)

    first, again, other = (
        apply(params, model_state, inputs, jax.random.key(seed))[0] for seed in (1, 1, 2)
    )

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_masks_differ_between_keys_under_vmap(name):
    model, params, model_state, inputs = initialized(name)
    twice, keys = np.stack([inputs, inputs]), jax.random.split(jax.random.key(0), 2)
    outputs, _ = jax.jit(jax.vmap(model.apply, in_axes=(None, None, 0, 0)))(
        params, model_state, twice, keys
    )
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_training_without_dropout_equals_inference(name):
    model, params, model_state, inputs = initialized(name)
    inferred, _ = model.apply(params, model_state, inputs, None)
    trained, _ = model.apply(params, model_state, inputs, jax.random.key(1))
    np.testing.assert_array_equal(inferred, trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_finite_gradient(name):
    model, params, model_state, inputs = initialized(name)

    def loss(params):
        outputs, _ = model.apply(params, model_state, inputs, jax.random.key(3))
        return (outputs * jax.random.normal(jax.random.key(4), outputs.shape)).sum()

    for path, grads in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grads).all(), path
        assert grads.any(), path


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_is_computed_in_bfloat16(name):
    """No norm, table or initial state promotes operands to float32."""
    _, params, model_state, inputs = initialized(name)
    model = models.in_bfloat16(NETWORKS[name].model)
    program = jax.jit(model.apply).lower(params, model_state, inputs, jax.random.key(0)).as_text()
    operands = re.findall(r"stablehlo\.(?:dot_general|convolution).* : \((.*)\) ->", program)
    assert set(re.findall(r"(?<=x)[a-z]+\d+(?=>)", " ".join(operands))) == {"bf16"}
