"""A small decoder-only transformer over characters, and the text that it learns (Vaswani et al., 2017).

Blocks normalize before they compute, attention looks back only, and positions are learned. Each window of a text is one
example: its characters are the inputs, and the characters after them the labels. The loss of an example is the mean
cross-entropy of its characters, in nats.
"""

from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp

import ctde_jax as ctde

TRAINING_SHARE = 0.9


class Block(nnx.Module):
    """Causal attention, then a perceptron at every place, each added to what came in."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value, self.mix = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.perceptron_norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[examples, length, width]` to the same shape."""

        def split_heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.heads, -1)

        normed = self.attention_norm(x)
        query, key, value = (split_heads(layer(normed)) for layer in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.reshape(x.shape))
        return x + self.contract(nnx.gelu(self.expand(self.perceptron_norm(x))))


class Transformer(nnx.Module):
    """Predicts the next token at every place of a window."""

    def __init__(self, vocabulary: int, length: int, width: int, blocks: int, heads: int, *, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=start, rngs=rngs)
        self.places = nnx.Embed(length, width, embedding_init=start, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `int32[examples, length]` to logits `[examples, length, vocabulary]`."""
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def transformer(vocabulary: int, length: int, width: int = 96, blocks: int = 2, heads: int = 4) -> ctde.models.Model:
    """Builds the decoder for windows of at most `length` tokens."""
    return ctde.models.from_nnx(lambda rngs: Transformer(vocabulary, length, width, blocks, heads, rngs=rngs))


def mean_cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Averages over the places of each example: logits `[examples, length, vocabulary]` to `float32[examples]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(axis=1)


def text_windows(path: Path, length: int, stride: int) -> tuple[ctde.data.Dataset, str]:
    """Cuts a text into windows: the first nine tenths to train on, the rest to test on.

    Args:
        path: A text file in UTF-8.
        length: Characters in a window.
        stride: Characters from the start of a training window to the start of the next; test windows do not overlap.

    Returns:
        The data set, and the vocabulary: the characters in the order of their tokens.
    """
    characters, tokens = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    cut = int(TRAINING_SHARE * len(tokens))

    def windows(part: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
        pieces = np.lib.stride_tricks.sliding_window_view(part, length + 1)[::stride]
        return pieces[:, :-1], pieces[:, 1:]

    arrays = *windows(tokens[:cut], stride), *windows(tokens[cut:], length)
    return ctde.data.from_arrays(*arrays, name=path.stem), "".join(characters)
