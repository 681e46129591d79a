"""Uses of model outputs on a node: probabilities, scores and text generation."""

from collections.abc import Iterator, Sequence

import numpy as np

from ctde_jax.bundle.card import Bundle
from ctde_jax.bundle.runtimes import Predict, Step, load, load_step
from ctde_jax.errors import InputError, check_at_least, check_not_negative


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the log-softmax of logits `[..., classes]` in nats, float64 `[..., classes]`.

    Examples:
        >>> ctde.bundle.answers.log_probabilities(np.zeros((1, 2), np.float32)).round(3)
        array([[-0.693, -0.693]])
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cross-entropy in nats and the accuracy of each example, float64 `[examples]`.

    For sequences, both are averaged over the positions.

    Args:
        outputs: Logits, float32 `[examples, ..., classes]`.
        labels: Indices of classes, int32 `[examples, ...]`.

    Examples:
        >>> logits = np.array([[0, 9], [9, 0]], np.float32)
        >>> losses, hits = ctde.bundle.answers.score(logits, np.array([1, 1], np.int32))
        >>> hits
        array([1., 0.])
    """
    of_label = np.take_along_axis(log_probabilities(outputs), labels[..., None], axis=-1)[..., 0]
    is_right = outputs.argmax(axis=-1) == labels
    return -of_label.reshape(len(labels), -1).mean(axis=1), is_right.reshape(len(labels), -1).mean(
        axis=1
    )


def write(
    bundle: Bundle, runtime: str, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[str]:
    """Continues a text and returns an iterator over its new characters.

    If the artifact has a step function, the model reads the whole text; otherwise it reads the last
    characters that fit into its input. As in `ctde_jax.generate`, temperature 0 selects the
    character with the largest logit; at other temperatures, the random numbers of the two functions
    differ.

    Args:
        bundle: Bundle of a language model.
        runtime: Name of the runtime that computes the logits.
        prompt: Start of the text.
        length: Number of characters to generate.
        temperature: Divisor of the logits; 0 always selects the most likely character.
        seed: Random seed for sampling.

    Returns:
        An iterator over `length` characters; each is computed when it is requested.

    Raises:
        InputError: If the model is not a language model, the prompt is empty or contains a
            character outside the vocabulary, a number is out of range, or the artifact cannot be
            loaded; see `runtimes.load`.
    """
    # This function is not a generator, so that it raises errors before the first character.
    vocabulary = bundle.card.vocabulary
    if not vocabulary or bundle.card.predicts != "tokens":
        raise InputError("prompt", f"requires a language model, but {bundle.folder} is not one.")
    check_at_least(1, length=length)
    check_at_least(0, seed=seed)
    check_not_negative(temperature=temperature)

    # Tokens are characters.
    token_of = {character: token for token, character in enumerate(vocabulary)}
    unknown = [character for character in prompt if character not in token_of]
    if unknown or not prompt:
        got = repr(unknown[0]) if unknown else "none"
        raise InputError(
            "prompt", f"must be one or more of the model's {len(vocabulary)} characters, got {got}."
        )

    # The iterator of logits reads `tokens` again for each character, after `draw` has appended one.
    tokens = [token_of[character] for character in prompt]
    step = load_step(bundle, runtime)
    if step is None:
        logits = _in_window(load(bundle, runtime), tokens, bundle.card.input_shape[0])
    else:
        logits = _place_by_place(step, tokens, bundle.card.carry)
    rng = np.random.default_rng(seed)

    def draw() -> str:
        # Gumbel-max trick: the argmax of logits with Gumbel noise is a sample of their softmax; at
        # temperature 0 it is the likeliest token.
        noise = rng.gumbel(size=len(vocabulary))
        tokens.append(int((next(logits) + temperature * noise).argmax()))
        return vocabulary[tokens[-1]]

    return (draw() for _ in range(length))


def _in_window(predict: Predict, tokens: Sequence[int], window: int) -> Iterator[np.ndarray]:
    """Yields the logits of the token after the last `window` tokens, float32 `[vocabulary]`.

    The caller appends a token to `tokens` before it requests the next logits.
    """
    while True:
        # Zeros fill the rest of the window; no position depends on later ones.
        seen = np.zeros((1, window), np.int32)
        latest = tokens[-window:]
        seen[0, : len(latest)] = latest
        yield predict(seen)[0, len(latest) - 1]


def _place_by_place(
    step: Step, tokens: Sequence[int], carry: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Yields the same logits as `_in_window`, from a step function that reads every token once.

    Args:
        step: Step function of the model.
        tokens: All tokens of the text, to which the caller appends.
        carry: Shapes of the carry for one example.
    """
    read = 0
    state = [np.zeros((1, *shape), np.float32) for shape in carry]
    outputs = np.zeros(0)
    while True:
        for token in tokens[read:]:
            outputs, state = step(np.array([token], np.int32), state)
        read = len(tokens)
        yield outputs[0]
