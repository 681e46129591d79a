"""What a node does with outputs: probabilities, scores, and text that is written token by token."""

from collections.abc import Iterator, Sequence

import numpy as np

from ctde_jax.bundle.card import Bundle
from ctde_jax.bundle.runtimes import Predict, Step, load, load_step
from ctde_jax.errors import InputError, check_at_least


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of probabilities that add up to 1 along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cross-entropy in nats, and the share of places that are right, of each example; float64[examples]."""
    of_label = np.take_along_axis(log_probabilities(outputs), labels[..., None], axis=-1)[..., 0]
    is_right = outputs.argmax(axis=-1) == labels
    return -of_label.reshape(len(labels), -1).mean(axis=1), is_right.reshape(len(labels), -1).mean(
        axis=1
    )


def write(
    bundle: Bundle, runtime: str, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[str]:
    """Continues a text, and returns one character at a time.

    A model that reads place by place remembers the whole text; another one sees as much of it as its window takes. At a
    temperature of 0 it is the text of `ctde_jax.generate`; at another one other random numbers decide.

    Args:
        bundle: Of a language model.
        runtime: What computes.
        prompt: How the text begins.
        length: Characters to write.
        temperature: What the logits are divided by; 0 always takes the likeliest character.
        seed: Decides the draws.

    Raises:
        InputError: It is no language model, the prompt is empty or has a character that is not in the vocabulary, or a
            number is out of range.
    """
    vocabulary = bundle.card.vocabulary
    if not vocabulary or bundle.card.predicts != "tokens":
        raise InputError("prompt", f"goes with a language model, and {bundle.folder} is none.")
    check_at_least(1, length=length)
    check_at_least(0, seed=seed)
    if not 0 <= temperature < np.inf:
        raise InputError("temperature", f"must be at least 0 and finite, got {temperature}.")
    token_of = {character: token for token, character in enumerate(vocabulary)}
    strange = [character for character in prompt if character not in token_of]
    if strange or not prompt:
        got = f"{strange[0]!r}, which is none of them" if strange else "none"
        raise InputError(
            "prompt", f"must be one or more of the model's {len(vocabulary)} characters, got {got}."
        )
    tokens, step = [token_of[character] for character in prompt], load_step(bundle, runtime)
    if step is None:
        logits = _in_window(load(bundle, runtime), tokens, bundle.card.input_shape[0])
    else:
        logits = _place_by_place(step, tokens, bundle.card.carry)
    rng = np.random.default_rng(seed)

    def draw() -> str:
        noise = rng.gumbel(size=len(vocabulary))
        # The largest logit after Gumbel noise is a draw from their softmax; noise of zero leaves the likeliest.
        tokens.append(int((next(logits) + temperature * noise).argmax()))
        return vocabulary[tokens[-1]]

    return (draw() for _ in range(length))


def _in_window(predict: Predict, tokens: Sequence[int], window: int) -> Iterator[np.ndarray]:
    """Yields the logits after the last token of a list that grows."""
    while True:
        seen = np.zeros((1, window), np.int32)  # what lies ahead is zero, and no place looks there
        latest = tokens[-window:]
        seen[0, : len(latest)] = latest
        yield predict(seen)[0, len(latest) - 1]


def _place_by_place(
    step: Step, tokens: Sequence[int], carry: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Likewise, and reads every token once."""
    read, state, outputs = 0, [np.zeros((1, *shape), np.float32) for shape in carry], np.zeros(0)
    while True:
        for token in tokens[read:]:
            outputs, state = step(np.array([token], np.int32), state)
        read = len(tokens)
        yield outputs[0]
