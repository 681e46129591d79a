"""Integer inputs, such as the tokens of a text, reach the model unchanged."""

import flax.nnx
import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.errors import InputError

VOCABULARY = 5
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (64, 9))
INPUTS, NEXT = TOKENS[:, :-1], TOKENS[:, 1:]


class Bigram(flax.nnx.Module):
    """Predicts the next token from the last one only."""

    def __init__(self, rngs: flax.nnx.Rngs):
        # Raises for inputs that are not integers.
        self.logits = flax.nnx.Embed(VOCABULARY, VOCABULARY, rngs=rngs)
        self.bias = flax.nnx.Param(jax.numpy.zeros(VOCABULARY))

    def __call__(self, tokens):
        return self.logits(tokens) + self.bias[None, None]


def mean_cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(axis=1)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_tokens_reach_the_model_unchanged(kind):
    data = ctde.data.from_arrays(INPUTS.astype(kind), NEXT.astype(kind))
    model = ctde.models.from_nnx(Bigram)
    raw = ctde.models.with_raw_inputs(model, data.shift, data.scale)

    params, model_state = raw.init(jax.random.key(0), data.train.inputs[:1])
    logits, _ = raw.apply(params, model_state, data.train.inputs, None)

    assert data.train.inputs.dtype == data.train.labels.dtype == np.int32
    np.testing.assert_array_equal(logits, params["logits"]["embedding"][data.train.inputs])
    assert data.classes == ()


def test_bigram_model_reaches_the_conditional_entropy():
    """A bigram model reaches the conditional entropy of the next token, computed from counts."""
    # There are two possible next tokens.
    tokens = (np.cumsum(TOKENS % 2 + 1, axis=1) % VOCABULARY).astype(np.int32)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    data = ctde.data.from_arrays(inputs, following, inputs, following)

    trained = ctde.fit(
        ctde.models.from_nnx(Bigram),
        data,
        optax.adam(0.3),
        ctde.Strategy(inner_steps=2),
        task=ctde.Task(mean_cross_entropy),
        devices=ctde.devices.start(2),
        batch_size=64,
        steps=100,
        show=False,
    )

    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (inputs, following), 1)
    probabilities = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log(np.where(probabilities > 0, probabilities, 1))).sum() / counts.sum()
    assert entropy < 0.75
    np.testing.assert_allclose(trained.history[-1]["loss"], entropy, atol=0.005)


def test_integers_equal_floats_in_a_dense_layer():
    """Integers give the same result as the same table in floating point."""
    integers = ctde.data.from_arrays(INPUTS, INPUTS[:, 0])
    floats = ctde.data.from_arrays(INPUTS.astype(np.float32), INPUTS[:, 0])
    outputs = []
    for data in (integers, floats):
        model = ctde.models.with_raw_inputs(ctde.models.mlp([8, 3]), data.shift, data.scale)
        params, model_state = model.init(jax.random.key(0), data.train.inputs[:1])
        outputs.append(model.apply(params, model_state, data.train.inputs, None)[0])
    np.testing.assert_array_equal(*outputs)


def test_integers_can_be_standardized():
    data = ctde.data.standardized(ctde.data.from_arrays(INPUTS, INPUTS[:, 0]))
    seen = (data.train.inputs - data.shift) * data.scale
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(seen.std(axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ((INPUTS + 2**40, NEXT), "x_train must fit in int32, got 10995"),
        ((INPUTS, NEXT - 2**40), "y_train must fit in int32, got -10995"),
        (
            (INPUTS, NEXT[:, :1]),
            (
                "y_train must have the shape [examples], got (64, 1); flatten the labels with "
                "numpy.ravel."
            ),
        ),
        ((INPUTS, NEXT[0, 0]), "y_train must have the shape [examples], got ()."),
        (
            (INPUTS, NEXT, INPUTS / 2, NEXT),
            "x_test must have the dtype of x_train, int32, got float32; convert one of them.",
        ),
    ],
)
def test_invalid_tokens_are_refused(arrays, sentence):
    with pytest.raises(InputError) as caught:
        ctde.data.from_arrays(*arrays)
    assert sentence in str(caught.value)


def test_label_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"y_train must be from 0 to 3, .* got 4 for example"):
        ctde.data.from_arrays(INPUTS, NEXT, classes=tuple("abcd"))
