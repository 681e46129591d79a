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
    for position in range(x.shape[1]):
        gates = x[:, position] @ layer["dense_i"]["kernel"] + state @ layer["dense_h"]["kernel"]
        input_gate, forget_gate, candidate, output_gate = jnp.split(
            gates + layer["dense_h"]["bias"][None], 4, axis=1
        )
        memory = sigmoid(forget_gate) * memory + sigmoid(input_gate) * jnp.tanh(candidate)
        state = sigmoid(output_gate) * jnp.tanh(memory)
    return state


def gru(layer, x):
    state = jnp.zeros((len(x), 4))
    for position in range(x.shape[1]):
        from_input = x[:, position] @ layer["dense_i"]["kernel"] + layer["dense_i"]["bias"][None]
        reset_gate, update_gate, candidate = jnp.split(from_input, 3, axis=1)
        recurrent_reset, recurrent_update, recurrent_candidate = jnp.split(
            state @ layer["dense_h"]["kernel"], 3, axis=1
        )
        update_gate = sigmoid(update_gate + recurrent_update)
        state = update_gate * state + (1 - update_gate) * jnp.tanh(
            candidate + sigmoid(reset_gate + recurrent_reset) * recurrent_candidate
        )
    return state


@pytest.mark.parametrize(("cell", "equations"), [("lstm", lstm), ("gru", gru)])
def test_classifier_output_depends_on_the_last_state(cell, equations, key):
    model = models.rnn_classifier(3, 6, hidden_size=4, cell=cell)
    params, model_state = jax.jit(model.init)(key, SEQUENCES)
    last = equations(params["recurrent"]["layers"][0]["cell"], SEQUENCES)
    outputs, _ = jax.jit(model.apply)(params, model_state, SEQUENCES, None)
    np.testing.assert_allclose(
        outputs, last @ params["out"]["kernel"] + params["out"]["bias"][None], atol=1e-5
    )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_language_model_is_causal(cell, key):
    model = models.rnn_language_model(5, hidden_size=4, cell=cell)
    tokens = jnp.array([[0, 1, 2, 3, 4, 0]])
    params, model_state = jax.jit(model.init)(key, tokens)
    apply = jax.jit(model.apply)
    logits, _ = apply(params, model_state, tokens, None)
    other, _ = apply(params, model_state, tokens.at[0, 3].set(1), None)
    np.testing.assert_array_equal(logits[:, :3], other[:, :3])
    assert (logits[:, 3:] != other[:, 3:]).any(axis=2).all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stream_of_steps_equals_the_whole_sequence(cell, precision, key):
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
        step, carry, step_outputs = jax.jit(model.stream.step), model.stream.start(2), []
        for position in range(5):
            outputs, carry = step(params, model_state, carry, sequence[:, position])
            step_outputs.append(outputs)
        whole, _ = jax.jit(model.apply)(params, model_state, sequence, None)
        streamed = jnp.stack(step_outputs, axis=1) if whole.ndim == 3 else step_outputs[-1]
        np.testing.assert_allclose(whole, streamed, atol=1e-5 if precision == "f32" else 0.01)


def test_model_that_needs_all_positions_has_no_stream(key):
    assert models.mlp([4, 2]).stream is None
    standardized = models.with_raw_inputs(
        models.rnn_classifier(3, 6), jnp.zeros((1, 5, 3)), jnp.ones((1, 5, 3))
    )
    assert standardized.stream is None  # the normalization depends on the position


def test_dropout_is_not_applied_to_the_recurrence():
    """With inputs of zeros, an output is 0 or twice the state without dropout."""
    recurrent, plain = (
        Recurrent(3, 8, 1, "lstm", dropout, rngs=nnx.Rngs(0)) for dropout in (0.5, 0.0)
    )
    zeros = jnp.zeros((2, 5, 3))
    for network in (recurrent, plain):
        network.layers[0].cell.dense_h.bias[...] = jnp.ones(32)
    states, dropped = plain(zeros), recurrent(zeros)
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * states), rtol=1e-6)
    assert 0.2 < (dropped == 0).mean() < 0.8


@pytest.mark.parametrize("shape", [(3,), (28, 28, 3), (5, 4)])
def test_inputs_that_are_not_sequences_are_refused(shape, key):
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
def test_invalid_network_is_refused(build, sentence):
    with pytest.raises(InputError) as caught:
        build()
    assert sentence in str(caught.value)
