"""What `limit.py` trains, and the least that a step has to compute and to move, as `accelerator.py` counts it, too.

**Operations.** A layer of m multiply-adds for an example takes 2 m floating-point operations forward, 2 m for the
gradient of its weights, and 2 m for that of its inputs where something before it learns. So an epoch of 60,000 examples
through 784-128-10 takes 60,000 x 2 x (2 x 784 x 128 + 3 x 128 x 10) = 24.5 GFLOP. Activations, losses and the optimizer
are not counted, nor what meets padding or, in causal attention, the future.

**Bytes.** Every parameter is moved ten times a step (read forward and backward; its gradient written and read;
parameter and both moments of Adam read and written), every number that leaves a layer four times (it and its gradient
written and read), and the inputs are read as they are stored.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

import ctde_jax as ctde

WINDOW, VOCABULARY = 64, 65
PLACES, FEATURES, LSTM_WIDTH = 28, 28, 128


class Layer(NamedTuple):
    """What one layer does with one example, going forward."""

    multiply_adds: int
    outputs: int = 0
    """Numbers that leave it."""

    to_inputs: float = 1.0
    """The share of its inputs whose gradient is needed."""


def mlp_layers(widths: Sequence[int]) -> list[Layer]:
    """From each width to the next."""
    first, *others = [Layer(before * after, after) for before, after in pairwise(widths)]
    return [first._replace(to_inputs=0), *others]


def cnn_layers() -> list[Layer]:
    """Two convolutions of 5 x 5 with 32 and 64 channels, halved after each, then 512 and 10."""

    def taps(side: int) -> int:
        return (5 * side - 2 * (2 + 1)) ** 2  # two rows at either border see one and two rows less

    return [
        Layer(taps(28) * 32, 28 * 28 * 32, to_inputs=0),
        Layer(taps(14) * 32 * 64, 14 * 14 * 64),
        Layer(7 * 7 * 64 * 512, 512),
        Layer(512 * 10, 10),
    ]


def lstm_layers(places: int = PLACES) -> list[Layer]:
    """The four gates at every place, from the input and from the state, which is empty at first."""
    gates = 4 * LSTM_WIDTH
    return [
        Layer(places * FEATURES * gates, places * gates, to_inputs=0),
        Layer(places * LSTM_WIDTH * gates, places * 2 * LSTM_WIDTH, to_inputs=(places - 1) / places),
        Layer(LSTM_WIDTH * 10, 10),
    ]


def transformer_layers(vocabulary: int, window: int, width: int, blocks: int) -> list[Layer]:
    """At every place: query, key, value and mix, attention to half of the window, and the perceptron."""
    seen = (window + 1) / 2
    block = [
        Layer(window * 4 * width**2, window * 5 * width),
        Layer(round(2 * window * seen * width), window * width),
        Layer(window * 8 * width**2, window * 6 * width),
    ]
    return [*blocks * block, Layer(window * width * vocabulary, window * vocabulary)]


class Case(NamedTuple):
    """What is trained."""

    build: Callable[[], ctde.models.Model]
    layers: list[Layer]
    input_shape: tuple[int, ...]
    batch_size: int
    examples: int
    """Of an epoch; fewer where an example takes long."""

    epochs: int
    """Those after the first, which warms up."""

    learns_text: bool = False

    @property
    def task(self) -> ctde.Task:
        return ctde.tasks.language_modeling if self.learns_text else ctde.tasks.classification

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.examples // self.batch_size)

    @property
    def step_examples(self) -> float:
        """Examples of a step, on average: the last batch of an epoch is filled up with some that do not count."""
        return self.examples / self.steps

    def inputs(self, examples: int) -> np.ndarray:
        """Draws random pictures, or tokens."""
        rng, shape = np.random.default_rng(0), (examples, *self.input_shape)
        if self.learns_text:
            return rng.integers(0, VOCABULARY, shape, dtype=np.int32)
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def labels(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the next tokens, or digits."""
        return np.roll(inputs, -1, axis=1) if self.learns_text else (np.arange(len(inputs)) % 10).astype(np.int32)


WIDTHS, TRANSFORMER = (784, 128, 10), {"vocabulary": VOCABULARY, "width": 128, "blocks": 4}
mlp, mlp_counted = partial(ctde.models.mlp, WIDTHS), mlp_layers(WIDTHS)
CASES = {
    "mlp-64": Case(mlp, mlp_counted, (28, 28), batch_size=64, examples=60_000, epochs=5),
    "mlp-512": Case(mlp, mlp_counted, (28, 28), batch_size=512, examples=60_000, epochs=10),
    "cnn": Case(partial(ctde.models.cnn, (28, 28), 10), cnn_layers(), (28, 28), 64, examples=3_840, epochs=2),
    "lstm": Case(
        partial(ctde.models.rnn_classifier, FEATURES, 10, LSTM_WIDTH),
        lstm_layers(),
        (PLACES, FEATURES),
        64,
        examples=7_680,
        epochs=2,
    ),
    "transformer": Case(
        partial(ctde.models.transformer, length=WINDOW, **TRANSFORMER),
        transformer_layers(window=WINDOW, **TRANSFORMER),
        (WINDOW,),
        batch_size=12,
        examples=480,
        epochs=2,
        learns_text=True,
    ),
}


def operations(layers: Sequence[Layer]) -> float:
    """Counts the floating-point operations of one example, forward and backward."""
    return sum(2 * layer.multiply_adds * (2 + layer.to_inputs) for layer in layers)


def bytes_of_step(case: Case, params: int) -> float:
    """Counts the bytes that one step moves."""
    inputs = prod(case.input_shape) * (4 if case.learns_text else 1)
    return 10 * 4 * params + case.batch_size * (inputs + 4 * 4 * sum(layer.outputs for layer in case.layers))


def working_set(case: Case, params: int) -> float:
    """Counts the bytes that one step touches: parameters, gradient, two moments, and what leaves the layers."""
    return 4 * 4 * params + case.batch_size * 4 * sum(layer.outputs for layer in case.layers)
