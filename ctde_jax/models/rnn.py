"""Recurrent networks: a state of fixed size is carried from one position to the next.

The cells are long short-term memory (Hochreiter and Schmidhuber, 1997) and the gated recurrent unit
(Cho et al., 2014). Dropout applies between layers, never between positions (Zaremba et al., 2014).
"""

from itertools import pairwise
from typing import TypeAlias

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int32

from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.models.base import Model
from ctde_jax.models.layers import Dropout, embed
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

Hidden: TypeAlias = Float[Array, "examples hidden_size"]
"""Outputs of a recurrent layer at one position."""

Carry: TypeAlias = tuple[Hidden, Hidden] | Hidden
"""Memory and output of an LSTM, or output of a GRU."""

CELLS = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}


class Recurrent(nnx.Module):
    """A stack of recurrent layers, each of which reads the outputs of the layer below."""

    def __init__(
        self,
        features: int,
        hidden_size: int,
        layers: int,
        cell: str,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        # The first layer reads the features, every other one the layer below.
        widths = [features] + [hidden_size] * layers
        self.layers = nnx.List([nnx.RNN(CELLS[cell](i, o, rngs=rngs)) for i, o in pairwise(widths)])
        self.dropout = Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "examples length features"]
    ) -> Float[Array, "examples length hidden_size"]:
        """Returns the outputs of the last layer at every position."""
        x = self.dropout(x)
        for layer in self.layers:
            # By default, `nnx.RNN` would start from a float32 state, also for bfloat16 inputs.
            x = self.dropout(layer(x, initial_carry=_empty(layer.cell, x.shape[0], x.dtype)))
        return x

    def start(self, examples: int) -> list[Carry]:
        """Returns the states of all layers before the first position, float32."""
        return [_empty(layer.cell, examples, jnp.float32) for layer in self.layers]

    def step(
        self, carry: list[Carry], x: Float[Array, "examples features"]
    ) -> tuple[Hidden, list[Carry]]:
        """Returns the outputs of the last layer at the next position, and the new states.

        This is for inference only, so there is no dropout.
        """
        # The cells are called directly, since `nnx.RNN` scans over a length axis.
        after: list[Carry] = []
        for layer, before in zip(self.layers, carry, strict=True):
            state, x = layer.cell(before, x)
            after.append(state)
        return x, after


class RNNClassifier(nnx.Module):
    """Classifies a sequence by the output at its last position."""

    def __init__(
        self,
        features: int,
        classes: int,
        hidden_size: int,
        layers: int,
        cell: str,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.features = features
        self.recurrent = Recurrent(features, hidden_size, layers, cell, dropout_rate, rngs=rngs)
        self.out = Linear(hidden_size, classes, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, "examples length features"]
    ) -> Float[Array, "examples classes"]:
        """Maps sequences to logits."""
        if inputs.ndim != 3 or inputs.shape[2] != self.features:
            raise InputError(
                "inputs",
                f"must be sequences [examples, length, {self.features}], got shape {inputs.shape}.",
            )
        # All sequences have the same length, so the last position is that of every example.
        return self.out(self.recurrent(inputs)[:, -1])

    def start(self, examples: int) -> list[Carry]:
        """Returns the states before the first position."""
        return self.recurrent.start(examples)

    def step(
        self, carry: list[Carry], inputs: Float[Array, "examples features"]
    ) -> tuple[Float[Array, "examples classes"], list[Carry]]:
        """Returns the logits after the next position, and the new states."""
        x, carry = self.recurrent.step(carry, inputs)
        return self.out(x), carry


class RNNLanguageModel(nnx.Module):
    """Predicts the next token at every position from the state at that position."""

    def __init__(
        self,
        vocabulary: int,
        hidden_size: int,
        layers: int,
        cell: str,
        dropout_rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(vocabulary, hidden_size, rngs=rngs)
        self.recurrent = Recurrent(hidden_size, hidden_size, layers, cell, dropout_rate, rngs=rngs)
        self.out = Linear(hidden_size, vocabulary, rngs=rngs)

    def __call__(
        self, tokens: Int32[Array, "examples length"]
    ) -> Float[Array, "examples length vocabulary"]:
        """Maps tokens to logits of the next token at every position."""
        return self.out(self.recurrent(embed(tokens, self.tokens)))

    def start(self, examples: int) -> list[Carry]:
        """Returns the states before the first token."""
        return self.recurrent.start(examples)

    def step(
        self, carry: list[Carry], tokens: Int32[Array, " examples"]
    ) -> tuple[Float[Array, "examples vocabulary"], list[Carry]]:
        """Returns the logits of the next token, and the new states."""
        # `embed` takes sequences, so the tokens get a length axis of 1 for the lookup.
        x, carry = self.recurrent.step(carry, embed(tokens[:, None], self.tokens)[:, 0])
        return self.out(x), carry


def rnn_classifier(
    features: int,
    classes: int,
    hidden_size: int = 128,
    layers: int = 1,
    cell: str = "lstm",
    dropout_rate: float = 0.0,
) -> Model:
    """Builds a classifier of sequences, such as images read row by row: `rnn_classifier(28, 10)`.

    Cells are long short-term memory (Hochreiter and Schmidhuber, 1997) or gated recurrent units
    (Cho et al., 2014). The model maps `[examples, length, features]` to logits,
    `float32[examples, classes]`.

    Args:
        features: Number of features at each position of a sequence.
        classes: Number of classes.
        hidden_size: Hidden size.
        layers: Number of recurrent layers.
        cell: "lstm" or "gru".
        dropout_rate: Dropout rate before and after each layer.

    Raises:
        InputError: The cell is not known, or a number is out of range.

    Examples:
        >>> model = ctde.models.rnn_classifier(features=28, classes=10, cell="gru")
        >>> images = np.zeros((1, 28, 28), np.float32)
        >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> ctde.models.count_params(params)
        61578
    """
    check_at_least(1, features=features, classes=classes, hidden_size=hidden_size, layers=layers)
    check_known("cell", cell, CELLS)
    return from_nnx(
        lambda rngs: RNNClassifier(
            features, classes, hidden_size, layers, cell, dropout_rate, rngs=rngs
        )
    )


def rnn_language_model(
    vocabulary: int,
    hidden_size: int = 128,
    layers: int = 2,
    cell: str = "lstm",
    dropout_rate: float = 0.0,
) -> Model:
    """Builds a language model over the tokens from 0 to `vocabulary - 1`, for texts of any length.

    Cells are those of `rnn_classifier`. The model maps `int32[examples, length]` to logits,
    `float32[examples, length, vocabulary]`.

    Args:
        vocabulary: Vocabulary size.
        hidden_size: Embedding size and hidden size.
        layers: Number of recurrent layers.
        cell: "lstm" or "gru".
        dropout_rate: Dropout rate before and after each layer.

    Raises:
        InputError: The cell is not known, or a number is out of range.

    Examples:
        >>> model = ctde.models.rnn_language_model(vocabulary=65, hidden_size=128)
        >>> tokens = np.zeros((1, 32), np.int32)
        >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), tokens)
        >>> ctde.models.count_params(params)
        279873
    """
    check_at_least(1, vocabulary=vocabulary, hidden_size=hidden_size, layers=layers)
    check_known("cell", cell, CELLS)
    return from_nnx(
        lambda rngs: RNNLanguageModel(
            vocabulary, hidden_size, layers, cell, dropout_rate, rngs=rngs
        )
    )


def _empty(cell: nnx.RNNCellBase, examples: int, dtype: jax.typing.DTypeLike) -> Carry:
    """Returns the state of a cell before the first position: zeros of the given dtype.

    `dtype` is that of the inputs: a float32 state would promote all outputs of the cell to float32.
    """
    # Only the shapes depend on the cell: the states of these cells start at zero.
    like = jax.eval_shape(lambda: cell.initialize_carry((examples, 1), nnx.Rngs(0)))
    return jax.tree.map(lambda part: jnp.zeros(part.shape, dtype), like)
