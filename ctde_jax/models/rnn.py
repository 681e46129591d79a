"""Recurrent networks: what was read so far is a state of fixed size, carried from one place to the next.

The cells are those of long short-term memory (Hochreiter and Schmidhuber, 1997) and the gated recurrent unit (Cho et
al., 2014). Dropout falls between the layers and never on the way from place to place (Zaremba et al., 2014).
"""

from itertools import pairwise
from typing import TypeAlias

import jax
from flax import nnx
from jax import numpy as jnp

from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.models.base import Model
from ctde_jax.models.layers import Dropout, embed
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

Carry: TypeAlias = tuple[jax.Array, jax.Array] | jax.Array
"""What a cell remembers, `[examples, width]`: memory and output of an LSTM, or the output of a GRU."""

CELLS = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}


class Recurrent(nnx.Module):
    """Layers of cells, each reading what the one before says at every place."""

    def __init__(
        self, features: int, width: int, layers: int, cell: str, dropout: float, *, rngs: nnx.Rngs
    ):
        widths = [features] + [width] * layers
        self.layers = nnx.List([nnx.RNN(CELLS[cell](i, o, rngs=rngs)) for i, o in pairwise(widths)])
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[examples, length, features]` to `[examples, length, width]`."""
        x = self.dropout(x)
        for layer in self.layers:
            x = self.dropout(layer(x, initial_carry=_empty(layer.cell, x.shape[0], x.dtype)))
        return x

    def start(self, examples: int) -> list[Carry]:
        """Returns the states of all layers before the first place."""
        return [_empty(layer.cell, examples, jnp.float32) for layer in self.layers]

    def step(self, carry: list[Carry], x: jax.Array) -> tuple[jax.Array, list[Carry]]:
        """Maps the states and `[examples, features]` to `[examples, width]` and the next states, in inference."""
        after: list[Carry] = []
        for layer, before in zip(self.layers, carry, strict=True):
            state, x = layer.cell(before, x)
            after.append(state)
        return x, after


class RNNClassifier(nnx.Module):
    """Says what a sequence is, from the state after its last place."""

    def __init__(
        self,
        features: int,
        classes: int,
        width: int,
        layers: int,
        cell: str,
        dropout: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.features = features
        self.recurrent = Recurrent(features, width, layers, cell, dropout, rngs=rngs)
        self.out = Linear(width, classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `[examples, length, features]` to `[examples, classes]`."""
        if inputs.ndim != 3 or inputs.shape[2] != self.features:
            raise InputError(
                "inputs",
                f"must be sequences [examples, length, {self.features}], got the shape {inputs.shape}.",
            )
        return self.out(self.recurrent(inputs)[:, -1])

    def start(self, examples: int) -> list[Carry]:
        """Returns the states before the first place."""
        return self.recurrent.start(examples)

    def step(self, carry: list[Carry], inputs: jax.Array) -> tuple[jax.Array, list[Carry]]:
        """Maps the states and one place `[examples, features]` to `[examples, classes]` and the next states."""
        x, carry = self.recurrent.step(carry, inputs)
        return self.out(x), carry


class RNNLanguageModel(nnx.Module):
    """Predicts the next token at every place, from the state up to there."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, cell: str, dropout: float, *, rngs: nnx.Rngs
    ):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.recurrent = Recurrent(width, width, layers, cell, dropout, rngs=rngs)
        self.out = Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `int32[examples, length]` to logits `[examples, length, vocabulary]`."""
        return self.out(self.recurrent(embed(tokens, self.tokens)))

    def start(self, examples: int) -> list[Carry]:
        """Returns the states before the first token."""
        return self.recurrent.start(examples)

    def step(self, carry: list[Carry], tokens: jax.Array) -> tuple[jax.Array, list[Carry]]:
        """Maps the states and one token `int32[examples]` to logits `[examples, vocabulary]` and the next states."""
        x, carry = self.recurrent.step(carry, embed(tokens[:, None], self.tokens)[:, 0])
        return self.out(x), carry


def rnn_classifier(
    features: int,
    classes: int,
    width: int = 128,
    layers: int = 1,
    cell: str = "lstm",
    dropout: float = 0.0,
) -> Model:
    """Builds a classifier of sequences, such as pictures read row by row: `rnn_classifier(28, 10)`.

    Args:
        features: The numbers at each place of a sequence.
        classes: The numbers that come out.
        width: The numbers in the state of a layer.
        layers: How many there are.
        cell: "lstm" or "gru".
        dropout: Which share is left out in training, before and after each layer.

    Raises:
        InputError: The cell's name is not known, or a number is out of range.
    """
    check_at_least(1, features=features, classes=classes, width=width, layers=layers)
    check_known("cell", cell, CELLS)
    return from_nnx(
        lambda rngs: RNNClassifier(features, classes, width, layers, cell, dropout, rngs=rngs)
    )


def rnn_language_model(
    vocabulary: int, width: int = 128, layers: int = 2, cell: str = "lstm", dropout: float = 0.0
) -> Model:
    """Builds a language model over the tokens from 0 to `vocabulary - 1`, for texts of any length.

    Args:
        vocabulary: How many tokens there are.
        width: The numbers in the vector of a token, and in the state of a layer.
        layers: How many there are.
        cell: "lstm" or "gru".
        dropout: Which share is left out in training, before and after each layer.

    Raises:
        InputError: The cell's name is not known, or a number is out of range.
    """
    check_at_least(1, vocabulary=vocabulary, width=width, layers=layers)
    check_known("cell", cell, CELLS)
    return from_nnx(
        lambda rngs: RNNLanguageModel(vocabulary, width, layers, cell, dropout, rngs=rngs)
    )


def _empty(cell: nnx.RNNCellBase, examples: int, dtype: jax.typing.DTypeLike) -> Carry:
    """The state before the first place, in the type of the inputs: a float32 one would make all that follows so."""
    like = jax.eval_shape(lambda: cell.initialize_carry((examples, 1), nnx.Rngs(0)))
    return jax.tree.map(lambda part: jnp.zeros(part.shape, dtype), like)
