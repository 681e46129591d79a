"""Tasks of a model: a loss and metrics, each of which returns one number for each example.

The caller sums them and divides by the number of examples, so averages are correct for any split
into batches and devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import exp, isnan, log, nan
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.user_code import reported

PerExample = Callable[[PyTree, Shaped[Array, "examples ..."]], Float32[Array, " examples"]]
"""`function(outputs, labels) -> values`; each leaf of `outputs` is `[examples, ...]`."""

RESERVED = (
    *(
        "split",
        "step",
        "epoch",
        "examples",
        "examples_per_second",
        "time",
        "bytes_sent",
        "skipped",
        "learning_rate",
    ),
    "objective",
)
"""Names that no metric may have: other columns of the history, and the minimized objective."""


class Task(NamedTuple):
    """A loss to minimize, and metrics to report with it.

    Examples:
        >>> def squared_error(outputs, targets):
        ...     return optax.squared_error(outputs[:, 0], targets)
        >>> regression = ctde.Task(squared_error)
        >>> regression.names
        ('loss',)
    """

    loss: PerExample
    metrics: Mapping[str, PerExample] = {}

    of_the_loss: Mapping[str, Callable[[float], float]] = {}
    """Functions of the average loss to report by name, such as the perplexity."""

    objective: PerExample | None = None
    """Function to minimize if it differs from the reported loss."""

    predicts: Literal["anything", "classes", "tokens"] = "anything"
    """Required outputs of the model.

    They are `[examples, classes]` for "classes", `[examples, length, vocabulary]` for "tokens", and
    any array or pytree for "anything".
    """

    lower_is_better: Collection[str] = ()
    """Metrics for which lower is better, as it is for the loss and its functions.

    For all other metrics, higher is better.
    """

    def measure(
        self, outputs: PyTree, labels: Shaped[Array, "examples ..."]
    ) -> dict[str, Float32[Array, " examples"]]:
        """Returns the loss and every metric by name.

        Raises:
            InputError: A function does not return one number for each example, a metric has a
                reserved name, or `lower_is_better` contains an unknown metric.
        """
        # Names must not collide with other columns of the history.
        taken = {"loss", *RESERVED} & {*self.metrics, *self.of_the_loss}
        if taken:
            raise InputError(
                "task",
                f"must not have a metric with a reserved name, got {', '.join(sorted(taken))}; "
                "rename it.",
            )

        # Only metrics have a choice: lower is always better for the loss and its functions.
        unknown = {*self.lower_is_better} - {*self.metrics}
        if unknown:
            raise InputError(
                "task",
                "must have only names of its metrics in lower_is_better, got "
                f"{', '.join(sorted(unknown))}.",
            )

        functions = {"loss": self.loss, **self.metrics}
        return {
            name: _per_example(name, function, outputs, labels)
            for name, function in functions.items()
        }

    def minimized(
        self,
        outputs: PyTree,
        labels: Shaped[Array, "examples ..."],
        measured: Mapping[str, Float32[Array, " examples"]],
    ) -> Float32[Array, " examples"]:
        """Returns the values to minimize, given the result of `measure`.

        Raises:
            InputError: The objective does not return one number for each example.
        """
        if self.objective is None:
            return measured["loss"]
        return _per_example("objective", self.objective, outputs, labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Reported names: the loss, the metrics, and the functions of the loss."""
        return ("loss", *self.metrics, *self.of_the_loss)

    def best(self, name: str, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """Returns the index of the row with the best loss or metric `name`.

        Ties resolve to the first row. Rows in which the value is NaN or missing are ignored; if no
        row is left, None is returned.
        """
        # `min` and `max` are unreliable with NaN, so such rows are excluded first.
        values = [row.get(name, nan) for row in rows]
        places = [place for place, value in enumerate(values) if not isnan(value)]
        first = max if name in self.metrics and name not in self.lower_is_better else min
        return first(places, key=values.__getitem__, default=None)

    def averages(self, sums: Mapping[str, float], examples: float) -> dict[str, float]:
        """Returns the averages of the loss and the metrics, and the functions of the average loss.

        Args:
            sums: Sums over all examples, by name.
            examples: Number of examples.
        """
        # Functions of the loss take the average: a mean of perplexities is not the perplexity.
        means = {name: float(sums[name]) / examples for name in ("loss", *self.metrics)}
        return means | {
            name: function(means["loss"]) for name, function in self.of_the_loss.items()
        }


def is_correct(
    outputs: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    """Returns 1 if the argmax equals the label, else 0 (ties resolve to the lowest index).

    For sequences, returns the fraction of correct positions. Outputs that contain a NaN are never
    correct. On CPU, an argmax over many outputs would take five times as long.

    Examples:
        >>> logits = jax.numpy.array([[0.1, 0.9], [0.8, 0.2]])
        >>> ctde.tasks.is_correct(logits, jax.numpy.array([1, 1]))
        Array([1., 0.], dtype=float32)
    """
    # The argmax is not the label if any output is larger, equal with a lower index, or NaN, for
    # which `<=` is False.
    own = jnp.take_along_axis(outputs, labels[..., None], axis=-1)
    is_before = lax.broadcasted_iota(jnp.int32, outputs.shape, outputs.ndim - 1) < labels[..., None]
    is_beaten = jnp.any(~(outputs <= own) | ((outputs == own) & is_before), axis=-1)
    return _mean_over_places((~is_beaten).astype(jnp.float32))


def cross_entropy(
    logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    """Returns the negative log-likelihood of the labels in nats, averaged over positions.

    Examples:
        >>> logits = jax.numpy.zeros((2, 10))
        >>> losses = ctde.tasks.cross_entropy(logits, jax.numpy.array([3, 7]))
        >>> [round(float(loss), 3) for loss in losses]
        [2.303, 2.303]
    """
    return _mean_over_places(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def smoothed(task: Task, amount: float) -> Task:
    """Returns the task with label smoothing in the minimized objective (Szegedy et al., 2016).

    The objective is the cross-entropy to labels mixed with the uniform distribution. The reported
    loss does not change, so runs remain comparable.

    Args:
        task: Task whose loss is the cross-entropy.
        amount: Weight of the uniform distribution, at least 0 and less than 1.

    Raises:
        InputError: The amount is out of range.

    Examples:
        >>> task = ctde.tasks.smoothed(ctde.tasks.classification, 0.1)
        >>> task.names
        ('loss', 'accuracy')
    """
    # At 1 the objective would not depend on the labels.
    if not 0 <= amount < 1:
        raise InputError("label_smoothing", f"must be at least 0 and less than 1, got {amount}.")

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        # Cross-entropy is linear in the target, so mix the two losses instead of the targets.
        to_uniform = -_mean_over_places(jax.nn.log_softmax(logits).mean(axis=-1))
        return (1 - amount) * task.loss(logits, labels) + amount * to_uniform

    return task._replace(objective=objective) if amount else task


def _mean_over_places(values: Float32[Array, "examples ..."]) -> Float32[Array, " examples"]:
    return values.reshape(len(values), -1).mean(axis=1)


def _per_example(
    name: str, function: PerExample, outputs: PyTree, labels: Shaped[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    # An error raised by user code is reported with the name of the function and its inputs.
    with reported("task", f"your {name}", outputs=outputs, labels=labels):
        values = function(outputs, labels)

    # A scalar, such as a mean over the batch, would broadcast silently in the sums.
    if jnp.shape(values) != labels.shape[:1]:
        raise InputError(
            "task",
            f"must return one {name} for each example, an array of shape {labels.shape[:1]}, got "
            f"shape {jnp.shape(values)}; do not average over the batch.",
        )
    return values


LARGEST_LOSS = 700.0
"""Cap of the loss in the perplexity: in a run that diverges, `exp` overflows above 709."""

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
"""Next-token prediction: a window is one example, and all its positions have equal weight."""
