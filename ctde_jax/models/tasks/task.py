"""A task: a loss and metrics, each of which returns one number for each example.

The caller sums them and divides by the number of examples, so averages are correct for any split
into batches and devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal, NamedTuple

import numpy as np
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
        "round",
        "skipped",
        "learning_rate",
        "gradient_norm",
    ),
    "objective",
)
"""Names that no metric may have: other columns of the history, and the minimized objective."""


class Units(NamedTuple):
    """Units of regression targets: a network is trained on `(target - mean) / deviation`.

    Examples:
        >>> ctde.tasks.Units(np.array([[3.0]]), np.array([[2.0]])).mean
        array([[3.]])
    """

    mean: np.ndarray  # float32[1, targets]
    deviation: np.ndarray  # float32[1, targets], positive


class Task(NamedTuple):
    """A loss to minimize, and metrics to report with it.

    Examples:
        >>> def squared_error(outputs, targets):
        ...     return optax.squared_error(outputs[:, 0], targets)
        >>> task = ctde.Task(squared_error)
        >>> task.names
        ('loss',)
    """

    loss: PerExample
    metrics: Mapping[str, PerExample] = {}

    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = {}
    """Functions of all averages by name, such as the perplexity.

    The averages are those of the loss, the metrics and the moments.
    """

    moments: Mapping[str, PerExample] = {}
    """Values whose averages only `derived` receives; they are not reported."""

    objective: PerExample | None = None
    """Function to minimize if it differs from the reported loss."""

    predicts: Literal["anything", "classes", "tokens", "targets"] = "anything"
    """Required outputs of the model.

    They are `[examples, classes]` for "classes", `[examples, length, vocabulary]` for "tokens",
    `[examples, targets]` for "targets", and any array or pytree for "anything".
    """

    lower_is_better: Collection[str] = ()
    """Metrics and derived values for which lower is better, as it is for the loss.

    For all others, higher is better.
    """

    units: Units | None = None
    """Units to which the outputs of the network are scaled; None leaves them unchanged."""

    def measure(
        self, outputs: PyTree, labels: Shaped[Array, "examples ..."]
    ) -> dict[str, Float32[Array, " examples"]]:
        """Returns the loss, every metric and every moment by name.

        Raises:
            InputError: A function does not return one number for each example, a metric has a
                reserved name, or `lower_is_better` contains an unknown metric.
        """
        # Names must not collide with other columns of the history.
        taken = {"loss", *RESERVED} & {*self.metrics, *self.moments, *self.derived}
        if taken:
            raise InputError(
                "task",
                f"must not have a metric with a reserved name, got {', '.join(sorted(taken))}; "
                "rename it.",
            )

        # Only these have a choice: lower is always better for the loss.
        unknown = {*self.lower_is_better} - {*self.metrics, *self.derived}
        if unknown:
            raise InputError(
                "task",
                "must have only names of its metrics in lower_is_better, got "
                f"{', '.join(sorted(unknown))}.",
            )

        functions = {"loss": self.loss, **self.metrics, **self.moments}
        return {
            name: per_example(name, function, outputs, labels)
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
        return per_example("objective", self.objective, outputs, labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Reported names: the loss, the metrics, and the derived values."""
        return ("loss", *self.metrics, *self.derived)

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the values that `measure` returns: the loss, the metrics, and the moments."""
        return ("loss", *self.metrics, *self.moments)

    def best(self, name: str, rows: Sequence[Mapping[str, Any]]) -> int | None:
        """Returns the index of the row with the best loss, metric or derived value `name`.

        Ties resolve to the first row. Rows in which the value is NaN or missing are ignored; if no
        row is left, None is returned.
        """
        # `min` and `max` are unreliable with NaN, so such rows are excluded first.
        values = [row.get(name, nan) for row in rows]
        places = [place for place, value in enumerate(values) if not isnan(value)]
        first = min if name == "loss" or name in self.lower_is_better else max
        return first(places, key=values.__getitem__, default=None)

    def averages(self, sums: Mapping[str, float], examples: float) -> dict[str, float]:
        """Returns the averages of the loss and the metrics, and the derived values.

        Args:
            sums: Sums over all examples, by name; see `summed`.
            examples: Number of examples.
        """
        # Derived values follow from averages: a mean of perplexities is not the perplexity.
        means = {name: float(sums[name]) / examples for name in self.summed}
        reported = {name: means[name] for name in ("loss", *self.metrics)}
        return reported | {name: function(means) for name, function in self.derived.items()}


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
    return mean_over_places((~is_beaten).astype(jnp.float32))


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
    return mean_over_places(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mean_over_places(values: Float32[Array, "examples ..."]) -> Float32[Array, " examples"]:
    """Returns the mean of each example over its further axes, such as positions."""
    return values.reshape(len(values), -1).mean(axis=1)


def per_example(
    name: str, function: PerExample, outputs: PyTree, labels: Shaped[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    """Calls a loss, metric or objective of the user, and returns its values.

    Args:
        name: Name of the function, for error messages.
        function: The function.
        outputs: Outputs of the model, whose leaves are `[examples, ...]`.
        labels: Labels of the examples.

    Raises:
        InputError: The function fails, or does not return one number for each example.
    """
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
