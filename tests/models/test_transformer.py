"""The decoder: causal attention, and windows of at most its length."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError
from ctde_jax.models.layers import Dropout
from ctde_jax.models.transformer import Block

MODEL = models.transformer(5, length=6, hidden_size=8, blocks=2, heads=2)
TOKENS = jnp.array([[0, 1, 2, 3, 4, 0]])


def test_benchmark_network_has_241728_parameters(key):
    params, _ = jax.eval_shape(models.transformer(65, 64).init, key, TOKENS)
    assert models.count_params(params) == 241_728


def test_attention_is_causal(key):
    params, model_state = jax.jit(MODEL.init)(key, TOKENS)
    apply = jax.jit(MODEL.apply)
    logits, _ = apply(params, model_state, TOKENS, None)
    other, _ = apply(params, model_state, TOKENS.at[0, 3].set(1), None)
    np.testing.assert_array_equal(logits[:, :3], other[:, :3])
    assert (logits[:, 3:] != other[:, 3:]).any(axis=2).all()


def test_logits_of_a_shorter_window_are_a_prefix(key):
    params, model_state = jax.jit(MODEL.init)(key, TOKENS)
    apply = jax.jit(MODEL.apply)
    logits, _ = apply(params, model_state, TOKENS, None)
    start, _ = apply(params, model_state, TOKENS[:, :4], None)
    np.testing.assert_allclose(start, logits[:, :4], rtol=1e-5, atol=1e-6)


def test_block_equals_its_formula(key):
    block, x = Block(8, 2, rngs=nnx.Rngs(0)), jax.random.normal(key, (5, 8))

    def normed(x):
        return (x - x.mean(axis=1, keepdims=True)) / jnp.sqrt(x.var(axis=1, keepdims=True) + 1e-6)

    past, heads = np.tril(np.ones((5, 5), bool)), []
    for part in (slice(0, 4), slice(4, 8)):
        query, key, value = (
            normed(x) @ layer.kernel[:, part] for layer in (block.query, block.key, block.value)
        )
        scores = jnp.where(past, query @ key.T / np.sqrt(4), -np.inf)
        heads.append(jax.nn.softmax(scores, axis=1) @ value)
    attended = x + jnp.concatenate(heads, axis=1) @ block.mix.kernel[...]
    expected = (
        attended
        + nnx.gelu(normed(attended) @ block.expand.kernel[...]) @ block.contract.kernel[...]
    )

    np.testing.assert_allclose(
        block(x[None], Dropout(0.0, rngs=nnx.Rngs(0)))[0], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (np.zeros((2, 7), np.int32), "length must be at least the 7 tokens of an input, got 6."),
        (
            np.zeros((2, 6), np.float32),
            "inputs must be tokens, integers [examples, length], got float32 of shape",
        ),
        (
            np.zeros((2, 6, 6), np.int32),
            "inputs must be tokens, integers [examples, length], got int32 of shape",
        ),
    ],
)
def test_invalid_inputs_are_refused(inputs, sentence, key):
    params, model_state = jax.eval_shape(MODEL.init, key, TOKENS)
    with pytest.raises(InputError) as caught:
        jax.eval_shape(MODEL.apply, params, model_state, inputs, None)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 5}, "heads must divide the hidden_size of 96, got 5."),
        ({"heads": 0}, "heads must be at least 1, got 0."),
        ({"length": 0}, "length must be at least 1, got 0."),
        ({"dropout_rate": 2}, "dropout_rate must be at least 0 and less than 1, got 2."),
    ],
)
def test_invalid_network_is_refused(options, sentence):
    with pytest.raises(InputError) as caught:
        models.transformer(**{"vocabulary": 5, "length": 6, **options})
    assert sentence in str(caught.value)
