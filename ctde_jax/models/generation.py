"""Text out of a language model: one token is drawn, joins the text, and the next one follows from it.

Each token costs a pass over all that the model sees: nothing is kept of the pass before, so any model can take part.
"""

from functools import partial
from math import isfinite

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_at_least
from ctde_jax.models.base import Model
from ctde_jax.models.user_code import describe


def generate(
    model: Model,
    params: PyTree,
    model_state: PyTree,
    prompt: jax.typing.ArrayLike,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    window: int | None = None,
) -> jax.Array:
    """Continues a text, token by token.

    Args:
        model: Maps `int32[examples, length]` to logits `[examples, length, vocabulary]`, where no place looks ahead.
        params: Its parameters.
        model_state: Its state.
        prompt: The start of the text, `int32[length]`.
        steps: How many tokens to draw.
        key: Decides the draws: the same key gives the same text.
        temperature: What the logits are divided by; 0 always takes the likeliest token.
        window: How many of the latest tokens the model sees, by default all; a transformer has a longest one.

    Returns:
        The new tokens, `int32[steps]`.

    Raises:
        InputError: The prompt is empty or holds what is no token of the model, or a number is out of range.
    """
    check_at_least(1, steps=steps, window=window)
    if not (temperature >= 0 and isfinite(temperature)):
        raise InputError("temperature", f"must be at least 0 and finite, got {temperature}.")
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise InputError(
            "prompt",
            f"must be one or more tokens, int32[length], got {prompt.dtype} of the shape {prompt.shape}.",
        )
    text = jnp.concatenate([prompt.astype(jnp.int32), jnp.zeros(steps, jnp.int32)])
    seen = len(text) if window is None else min(window, len(text))
    logits, _ = jax.eval_shape(model.apply, params, model_state, text[None, :seen], None)
    if not hasattr(logits, "shape") or len(logits.shape) != 3:
        raise InputError(
            "model",
            f"must give logits at every place, [examples, length, vocabulary], got {describe(logits)}.",
        )
    strange = prompt[(prompt < 0) | (prompt >= logits.shape[2])]
    if strange.size:
        raise InputError(
            "prompt", f"must hold tokens from 0 to {logits.shape[2] - 1}, got {strange[0]}."
        )
    return _continue(model.apply, steps, seen, params, model_state, text, key, temperature)[
        len(prompt) :
    ]


@partial(jax.jit, static_argnames=("apply", "steps", "window"))
def _continue(apply, steps, window, params, model_state, text, key, temperature):
    """Fills in the last `steps` tokens of the text."""

    def write(place, text):
        start = jnp.maximum(place - window, 0)
        seen = lax.dynamic_slice(
            text, (start,), (window,)
        )  # what lies ahead is zero still, and no place looks there
        logits, _ = apply(params, model_state, seen[None], None)
        noise = jax.random.gumbel(jax.random.fold_in(key, place), logits.shape[2:])
        # The largest logit after Gumbel noise is a draw from their softmax; noise of zero leaves the likeliest.
        return text.at[place].set((logits[0, place - start - 1] + temperature * noise).argmax())

    return lax.fori_loop(len(text) - steps, len(text), write, text)
