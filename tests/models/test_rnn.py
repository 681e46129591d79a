"""Recurrent networks: their equations, and the dependence of states on inputs."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.nn import sigmoid

from ctde_jax import models
from ctde_jax.errors import InputError
from ctde_jax.models.rnn import Recurrent

SEQUENCES = jax.random.normal(jax.random.key(7), (2, 5, 3))


def lstm(layer, x):
    memory = state = jnp.zeros((len(x), 4))
    for place in range(x.shape[1]):
        gates = x[:, place] @ layer["dense_i"]["kernel"] + state @ layer["dense_h"]["kernel"]
        take, keep, new, show = jnp.split(gates + layer["dense_h"]["bias"][None], 4, axis=1)
        memory = sigmoid(keep) * memory + sigmoid(take) * jnp.tanh(new)
        state = sigmoid(show) * jnp.tanh(memory)
    return state


def gru(layer, x):
    state = jnp.zeros((len(x), 4))
    for place in range(x.shape[1]):
        seen = x[:, place] @ layer["dense_i"]["kernel"] + layer["dense_i"]["bias"][None]
        reset, keep, new = jnp.split(seen, 3, axis=1)
        reset_too, keep_too, new_too = jnp.split(state @ layer["dense_h"]["kernel"], 3, axis=1)
        keep = sigmoid(keep + keep_too)
        state = keep * state + (1 - keep) * jnp.tanh(new + sigmoid(reset + reset_too) * new_too)
    return state


@pytest.mark.parametrize(("cell", "equations"), [("lstm", lstm), ("gru", gru)])
def test_classifier_reads_its_answer_off_the_last_state(cell, equations, key):
    model = models.rnn_classifier(3, 6, hidden_size=4, cell=cell)
    params, model_state = jax.jit(model.init)(key, SEQUENCES)
    last = equations(params["recurrent"]["layers"][0]["cell"], SEQUENCES)
    outputs, _ = jax.jit(model.apply)(params, model_state, SEQUENCES, None)
    np.testing.assert_allclose(
        outputs, last @ params["out"]["kernel"] + params["out"]["bias"][None], atol=1e-5
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_language_model_knows_the_past_and_not_the_future(cell, key):
    model = models.rnn_language_model(5, hidden_size=4, cell=cell)
    tokens = jnp.array([[0, 1, 2, 3, 4, 0]])
    params, model_state = jax.jit(model.init)(key, tokens)
    apply = jax.jit(model.apply)
    logits, _ = apply(params, model_state, tokens, None)
    other, _ = apply(params, model_state, tokens.at[0, 3].set(1), None)
    np.testing.assert_array_equal(logits[:, :3], other[:, :3])
    assert (logits[:, 3:] != other[:, 3:]).any(axis=2).all()


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_step_by_step_says_what_the_whole_sequence_says(cell, precision, key):
    """With raw inputs, at every position of a text and at the end of a sequence; no dropout."""
    wrap = models.in_bfloat16 if precision == "bf16" else lambda model: model
    pixels = jax.random.randint(key, (2, 5, 3), 0, 256).astype(jnp.uint8)
    for model, sequence in [
        (models.rnn_classifier(3, 6, 4, 2, cell, 0.5), pixels),
        (models.rnn_language_model(256, 4, 2, cell, 0.5), pixels[..., 0].astype(jnp.int32)),
    ]:
        scale = jnp.float32(1 / 255) if sequence.ndim == 3 else jnp.int32(1)
        model = models.with_raw_inputs(wrap(model), jnp.zeros((), scale.dtype), scale)
        params, model_state = model.init(key, sequence)
        step, carry, says = jax.jit(model.stream.step), model.stream.start(2), []
        for place in range(5):
            outputs, carry = step(params, model_state, carry, sequence[:, place])
            says.append(outputs)
        whole, _ = jax.jit(model.apply)(params, model_state, sequence, None)
        right = jnp.stack(says, axis=1) if whole.ndim == 3 else says[-1]
        np.testing.assert_allclose(whole, right, atol=1e-5 if precision == "f32" else 0.01)


def test_only_what_can_be_read_place_by_place_has_a_stream(key):
    assert models.mlp([4, 2]).stream is None
    standardized = models.with_raw_inputs(
        models.rnn_classifier(3, 6), jnp.zeros((1, 5, 3)), jnp.ones((1, 5, 3))
    )
    assert standardized.stream is None  # a place does not know which one it is


def test_dropout_spares_the_way_from_place_to_place():
    """Zeroed inputs leave only the dropped fraction: the states below are those without dropout."""
    recurrent, plain = (
        Recurrent(3, 8, 1, "lstm", dropout, rngs=nnx.Rngs(0)) for dropout in (0.5, 0.0)
    )
    nothing = jnp.zeros((2, 5, 3))
    for network in (recurrent, plain):
        network.layers[0].cell.dense_h.bias[...] = jnp.ones(32)
    states, dropped = plain(nothing), recurrent(nothing)
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * states), rtol=1e-6)
    assert 0.2 < (dropped == 0).mean() < 0.8


@pytest.mark.parametrize("shape", [(3,), (28, 28, 3), (5, 4)])
def test_what_is_no_sequence_is_refused_in_a_sentence(shape, key):
    model = models.rnn_classifier(3, 6)
    params, model_state = jax.eval_shape(model.init, key, SEQUENCES)
    with pytest.raises(InputError) as caught:
        jax.eval_shape(model.apply, params, model_state, jnp.zeros((2, *shape)), None)
    assert (
        str(caught.value)
        == f"inputs must be sequences [examples, length, 3], got shape {(2, *shape)}."
    )


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: models.rnn_classifier(3, 6, cell="ltsm"),
            "cell must be one of lstm, gru, got 'ltsm'; did you mean",
        ),
        (
            lambda: models.rnn_language_model(5, cell="rnn"),
            "cell must be one of lstm, gru, got 'rnn'",
        ),
        (lambda: models.rnn_classifier(3, 6, layers=0), "layers must be at least 1, got 0."),
        (lambda: models.rnn_language_model(0), "vocabulary must be at least 1, got 0."),
        (
            lambda: models.rnn_language_model(5, dropout_rate=-0.1),
            "dropout_rate must be at least 0 and less than 1, got -0.1.",
        ),
    ],
)
def test_wrong_network_is_refused_in_a_sentence(build, sentence):
    with pytest.raises(InputError) as caught:
        build()
    assert sentence in str(caught.value)
