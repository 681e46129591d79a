"""What a model is trained for: a loss and metrics, each one number for one example.

Averages are made of these by whoever counts the examples, so they are right for any split into batches and devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import exp, isnan, log, nan
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.user_code import reported

PerExample = Callable[[PyTree, jax.Array], jax.Array]
"""`function(outputs [examples, ...], labels [examples, ...]) -> float32[examples]`"""


RESERVED = (
    *(
        "split",
        "step",
        "epoch",
        "examples",
        "examples_per_second",
        "bytes_sent",
        "skipped",
        "learning_rate",
    ),
    "objective",
)
"""Names that no metric may have: of the other numbers in a row of the history, and of the minimized objective."""


class Task(NamedTuple):
    """A loss to be minimized, and metrics to be reported beside it."""

    loss: PerExample
    metrics: Mapping[str, PerExample] = {}

    of_the_loss: Mapping[str, Callable[[float], float]] = {}
    """What is reported as a function of the average loss, such as the perplexity."""

    objective: PerExample | None = None
    """What is minimized where it is not the loss that is reported."""

    predicts: Literal["anything", "classes", "tokens"] = "anything"
    """What outputs the model must have: `[examples, classes]`, `[examples, length, vocabulary]`, or any."""

    lower_is_better: Collection[str] = ()
    """The metrics of which less is better, as of the loss and its functions; of the others more is better."""

    def measure(self, outputs: PyTree, labels: jax.Array) -> dict[str, jax.Array]:
        """Returns the loss and every metric by name, `float32[examples]` each.

        Raises:
            InputError: One of them is not one number for each example, a metric bears a name of the history's own, or
                less is better of a metric that there is not.
        """
        taken = {"loss", *RESERVED} & {*self.metrics, *self.of_the_loss}
        if taken:
            raise InputError(
                "task", f"must not call a metric {' or '.join(sorted(taken))}; rename it."
            )
        unknown = {*self.lower_is_better} - {*self.metrics}
        if unknown:
            raise InputError(
                "task",
                f"must say lower_is_better of its metrics only, got {', '.join(sorted(unknown))}.",
            )
        functions = {"loss": self.loss, **self.metrics}
        return {
            name: _per_example(name, function, outputs, labels)
            for name, function in functions.items()
        }

    def minimized(
        self, outputs: PyTree, labels: jax.Array, measured: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Returns what is minimized, `float32[examples]`, where `measure` has returned this; raises as that does."""
        if self.objective is None:
            return measured["loss"]
        return _per_example("objective", self.objective, outputs, labels)

    @property
    def names(self) -> tuple[str, ...]:
        """What is reported: the loss, the metrics, and what is a function of the loss."""
        return ("loss", *self.metrics, *self.of_the_loss)

    def best(self, name: str, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """Returns the place of the row that is best by the loss or a metric, of equal ones the first.

        A row in which it is NaN, or missing, is never best; returns None where there is no other.
        """
        values = [row.get(name, nan) for row in rows]
        places = [place for place, value in enumerate(values) if not isnan(value)]
        first = max if name in self.metrics and name not in self.lower_is_better else min
        return first(places, key=values.__getitem__, default=None)

    def averages(self, sums: Mapping[str, float], examples: float) -> dict[str, float]:
        """Returns the averages of sums over so many examples, and what is a function of the loss."""
        means = {name: float(sums[name]) / examples for name in ("loss", *self.metrics)}
        return means | {
            name: function(means["loss"]) for name, function in self.of_the_loss.items()
        }


def is_correct(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Says 1 where the largest output, of equal ones the first, is the label's, else 0; of several, the share.

    That is `outputs.argmax(-1) == labels`, but among NaNs nothing is right; on a CPU, over many outputs, an argmax
    would take five times as long.
    """
    own = jnp.take_along_axis(outputs, labels[..., None], axis=-1)
    is_before = lax.broadcasted_iota(jnp.int32, outputs.shape, outputs.ndim - 1) < labels[..., None]
    is_beaten = jnp.any(~(outputs <= own) | ((outputs == own) & is_before), axis=-1)
    return _mean_over_places((~is_beaten).astype(jnp.float32))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the negative log-probability of the labels in nats, averaged over the places of an example.

    Logits are `[examples, classes]` with labels `int32[examples]`, or `[examples, length, vocabulary]` with labels
    `int32[examples, length]`.
    """
    return _mean_over_places(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def smoothed(task: Task, amount: float) -> Task:
    """Makes the task minimize the cross-entropy to labels that are mixed with the uniform distribution.

    What is reported stays the task's own loss, so that runs can be compared (Szegedy et al., 2016).

    Args:
        task: One whose loss is the cross-entropy.
        amount: The uniform distribution's share, from 0 to less than 1.
    """
    if not 0 <= amount < 1:
        raise InputError("label_smoothing", f"must be at least 0 and less than 1, got {amount}.")

    def objective(logits: jax.Array, labels: jax.Array) -> jax.Array:
        to_uniform = -_mean_over_places(jax.nn.log_softmax(logits).mean(axis=-1))
        return (1 - amount) * task.loss(logits, labels) + amount * to_uniform

    return task._replace(objective=objective) if amount else task


def _mean_over_places(values: jax.Array) -> jax.Array:
    return values.reshape(len(values), -1).mean(axis=1)


def _per_example(name: str, function: PerExample, outputs: PyTree, labels: jax.Array) -> jax.Array:
    with reported("task", f"your {name}", outputs=outputs, labels=labels):
        values = function(outputs, labels)
    if jnp.shape(values) != labels.shape[:1]:
        raise InputError(
            "task",
            f"must give one {name} for each example, an array of the shape {labels.shape[:1]}, got the shape "
            f"{jnp.shape(values)}; leave out the mean over the batch.",
        )
    return values


LARGEST_LOSS = 700.0
"""Of a larger one, in a run that goes astray, the perplexity is not a floating-point number any more."""

classification = Task(cross_entropy, {"accuracy": is_correct}, predicts="classes")

language_modeling = Task(
    cross_entropy,
    {"accuracy": is_correct},
    {
        "bits_per_character": lambda loss: loss / log(2),
        "perplexity": lambda loss: exp(min(loss, LARGEST_LOSS)),
    },
    predicts="tokens",
)
"""The next token at every place of a window; each window is one example, and all its places count alike."""
