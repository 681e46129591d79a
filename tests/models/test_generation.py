"""Text is generated token by token from the model's distribution given the text so far."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.devices.replica import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models import Model
from ctde_jax.models.generation import generate

LONGEST = 6
MODELS = {
    "transformer": models.with_raw_inputs(
        models.transformer(11, LONGEST, hidden_size=8, heads=2), np.int32(0), np.int32(1)
    ),
    "lstm": models.rnn_language_model(11, hidden_size=8),
}
LOGITS = jnp.array([0.0, 1.0, 2.0, -1.0])
CONSTANT = Model(
    init=lambda key, inputs: ({}, {}),
    apply=lambda params, model_state, inputs, key: (
        jnp.broadcast_to(LOGITS, (*inputs.shape, 4)),
        model_state,
    ),
)


def initialized(name: str) -> tuple[Model, PyTree, PyTree]:
    """Large parameters separate the likeliest token, and make it depend on the preceding tokens."""
    model = MODELS[name]
    params, model_state = jax.jit(model.init)(jax.random.key(0), np.zeros((1, LONGEST), np.int32))
    return model, jax.tree.map(lambda x: 5 * x, params), model_state


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("prompt", "steps"), [([1, 2, 3, 4], 6), ([1, 2, 3, 4, 5, 6, 7, 8], 3)])
def test_greedy_text_equals_that_of_a_loop_over_the_growing_text(name, prompt, steps, key):
    """The text grows beyond the window, or the prompt is longer than the window."""
    model, params, model_state = initialized(name)
    apply = jax.jit(model.apply)

    text = list(prompt)
    for _ in range(steps):
        logits, _ = apply(params, model_state, jnp.array([text[-LONGEST:]]), None)
        text.append(int(logits[0, -1].argmax()))

    tokens = generate(model, params, model_state, prompt, steps, key, temperature=0, window=LONGEST)
    assert tokens.dtype == jnp.int32
    assert tokens.tolist() == text[len(prompt) :]


def test_default_window_is_the_whole_text(key):
    default, long, short = (
        generate(*initialized("lstm"), [1, 2, 3], 20, key, window=window)
        for window in (None, 99, 1)
    )
    np.testing.assert_array_equal(default, long)
    assert (default != short).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_match_the_softmax(temperature, key):
    """Pearson's statistic with three degrees of freedom is below 16.3 in 999 of 1,000 samples."""
    tokens = generate(CONSTANT, {}, {}, [0], 4000, key, temperature, window=1)
    expected = 4000 * jax.nn.softmax(LOGITS / temperature)
    assert ((np.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum() < 16.3


def test_same_key_gives_the_same_text_and_longer_text_continues_it(key):
    text = generate(CONSTANT, {}, {}, [0], 50, key, window=1)
    np.testing.assert_array_equal(generate(CONSTANT, {}, {}, [0], 50, key, window=1), text)
    np.testing.assert_array_equal(generate(CONSTANT, {}, {}, [0], 80, key, window=1)[:50], text)
    assert (generate(CONSTANT, {}, {}, [0], 50, jax.random.key(1), window=1) != text).any()


def test_generation_is_compiled_once(key):
    traces = []

    def apply(params, model_state, inputs, key):
        traces.append(inputs.shape)
        return CONSTANT.apply(params, model_state, inputs, key)

    counted = Model(CONSTANT.init, apply)
    generate(counted, {}, {}, [0, 1], 5, key)
    once = len(traces)
    generate(counted, {}, {}, [2, 3], 5, jax.random.key(1), temperature=0.5)
    assert len(traces) == once


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"prompt": []},
            "prompt must be one or more tokens, int32[length], got float32 of shape (0,).",
        ),
        (
            {"prompt": [[1, 2]]},
            "prompt must be one or more tokens, int32[length], got int32 of shape (1, 2).",
        ),
        (
            {"prompt": [0.5]},
            "prompt must be one or more tokens, int32[length], got float32 of shape (1,).",
        ),
        (
            {"prompt": [1, 11], "window": LONGEST},
            "prompt must contain tokens from 0 to 10, got 11.",
        ),
        ({"prompt": [-1], "window": LONGEST}, "prompt must contain tokens from 0 to 10, got -1."),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0."),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan."),
        ({"steps": 0}, "steps must be at least 1, got 0."),
        ({"window": 0}, "window must be at least 1, got 0."),
        ({"window": LONGEST + 1}, "length must be at least the 7 tokens of an input, got 6."),
    ],
)
def test_invalid_arguments_are_refused(options, sentence, key):
    model = MODELS["transformer"]
    params, model_state = jax.eval_shape(model.init, key, np.zeros((1, LONGEST), np.int32))
    with pytest.raises(InputError) as caught:
        generate(
            model, params, model_state, **{"prompt": [1, 2], "steps": 8, "key": key, **options}
        )
    assert sentence in str(caught.value)


def test_classifier_is_refused(key):
    model = models.mlp([3, 11])
    params, model_state = model.init(key, jnp.zeros((1, 3)))
    with pytest.raises(
        InputError, match=r"model must return logits at every position, .* got float32"
    ):
        generate(model, params, model_state, [1, 2], 1, key)
