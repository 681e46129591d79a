"""Autoregressive text generation: each sampled token is appended to the input of the next one.

Every token takes a forward pass over the whole context. Nothing is cached between passes, so this
works for any language model.
"""

from functools import partial

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Int32, Key

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_at_least, check_not_negative
from ctde_jax.models.base import Model
from ctde_jax.models.user_code import describe


def generate(
    model: Model,
    params: PyTree,
    model_state: PyTree,
    prompt: Int[ArrayLike, " length"],
    steps: int,
    key: Key[Array, ""],
    temperature: float = 1.0,
    window: int | None = None,
) -> Int32[Array, " steps"]:
    """Continues a text token by token.

    Args:
        model: Causal language model from `int32[examples, length]` to logits
            `[examples, length, vocabulary]`.
        params: Parameters of the model.
        model_state: State of the model.
        prompt: Start of the text.
        steps: Number of tokens to generate.
        key: Random key for sampling; the same key gives the same text.
        temperature: Divisor of the logits; 0 always selects the most likely token.
        window: Number of most recent tokens that the model reads (default: all). Required if the
            model has a maximum length, such as a transformer, and the text exceeds it.

    Returns:
        The new tokens.

    Raises:
        InputError: The prompt is empty or contains an unknown token, the model does not return
            logits, or a number is out of range.

    Examples:
        >>> bigram = ctde.models.from_nnx(lambda rngs: nnx.Embed(5, 5, rngs=rngs))
        >>> key = jax.random.key(0)
        >>> params, model_state = bigram.init(key, np.zeros((1, 8), np.int32))
        >>> tokens = ctde.generate(bigram, params, model_state, [0, 1], steps=20, key=key)
        >>> tokens.shape
        (20,)
    """
    # Check the arguments that do not depend on the model.
    check_at_least(1, steps=steps, window=window)
    check_not_negative(temperature=temperature)
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise InputError(
            "prompt",
            f"must be one or more tokens, int32[length], got {prompt.dtype} of shape "
            f"{prompt.shape}.",
        )

    # Trace the model once, without computing anything, for the vocabulary size of its logits.
    text = jnp.concatenate([prompt.astype(jnp.int32), jnp.zeros(steps, jnp.int32)])
    seen = len(text) if window is None else min(window, len(text))
    logits, _ = jax.eval_shape(model.apply, params, model_state, text[None, :seen], None)
    if not hasattr(logits, "shape") or len(logits.shape) != 3:
        raise InputError(
            "model",
            "must return logits at every position, [examples, length, vocabulary], "
            f"got {describe(logits)}.",
        )

    # An embedding lookup does not raise if a token is out of range, so check the prompt here.
    unknown = prompt[(prompt < 0) | (prompt >= logits.shape[2])]
    if unknown.size:
        raise InputError(
            "prompt", f"must contain tokens from 0 to {logits.shape[2] - 1}, got {unknown[0]}."
        )

    return _continue(model.apply, steps, seen, params, model_state, text, key, temperature)[
        len(prompt) :
    ]


@partial(jax.jit, static_argnames=("apply", "steps", "window"))
def _continue(
    apply,
    steps,
    window,
    params,
    model_state,
    text: Int32[Array, " length"],
    key: Key[Array, ""],
    temperature,
) -> Int32[Array, " length"]:
    """Fills in the last `steps` tokens of the text."""

    def write(place, text):
        start = jnp.maximum(place - window, 0)
        # If the text is still shorter than the window, the slice ends in zeros that have not been
        # filled in; a causal model does not read them at earlier positions.
        seen = lax.dynamic_slice(text, (start,), (window,))
        logits, _ = apply(params, model_state, seen[None], None)

        # Gumbel-max trick: the argmax of logits + temperature * noise is a sample from
        # softmax(logits / temperature), and for temperature 0 the most likely token.
        noise = jax.random.gumbel(jax.random.fold_in(key, place), logits.shape[2:])
        return text.at[place].set((logits[0, place - start - 1] + temperature * noise).argmax())

    return lax.fori_loop(len(text) - steps, len(text), write, text)
