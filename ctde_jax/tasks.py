"""What a model is trained for: a loss and metrics, each one number for one example.

Averages are made of these by whoever counts the examples, so they are right for any split into batches and devices.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.replica import PyTree

PerExample = Callable[[PyTree, jax.Array], jax.Array]
"""`function(outputs [examples, ...], labels [examples, ...]) -> float32[examples]`"""


RESERVED = ("split", "step", "epoch", "examples", "examples_per_second", "bytes_sent")
"""What a row of the history says beside the loss and the metrics, which must not bear these names."""


class Task(NamedTuple):
    """A loss to be minimized, and metrics to be reported beside it."""

    loss: PerExample
    metrics: Mapping[str, PerExample] = {}

    def measure(self, outputs: PyTree, labels: jax.Array) -> dict[str, jax.Array]:
        """Returns the loss and every metric by name, `float32[examples]` each.

        Raises:
            InputError: One of them is not one number for each example, or a metric bears a name of the history's own.
        """
        taken = {"loss", *RESERVED} & set(self.metrics)
        if taken:
            raise InputError("task", f"must not call a metric {' or '.join(sorted(taken))}; rename it.")
        measured = {name: function(outputs, labels) for name, function in [("loss", self.loss), *self.metrics.items()]}
        for name, values in measured.items():
            if jnp.shape(values) != labels.shape[:1]:
                raise InputError(
                    "task",
                    f"must give one {name} for each example, an array of the shape {labels.shape[:1]}, got the shape "
                    f"{jnp.shape(values)}; leave out the mean over the batch.",
                )
        return measured


def is_correct(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Says 1 where the largest output is the label's, else 0."""
    return (outputs.argmax(-1) == labels).astype(jnp.float32)


classification = Task(optax.softmax_cross_entropy_with_integer_labels, {"accuracy": is_correct})
