"""Tasks of a model: a loss and metrics, each of which returns one number for each example.

The caller sums them and divides by the number of examples, so averages are correct for any split
into batches and devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import exp, inf, isnan, log, nan
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from ctde_jax.data import Dataset, slices, targets_or_classes
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, quoted
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
        task: Task whose loss is the cross-entropy, without another objective.
        amount: Weight of the uniform distribution, at least 0 and less than 1.

    Raises:
        InputError: The amount is out of range, or the task has another objective.

    Examples:
        >>> task = ctde.tasks.smoothed(ctde.tasks.classification, 0.1)
        >>> task.names
        ('loss', 'accuracy')
    """
    # At 1 the objective would not depend on the labels.
    if not 0 <= amount < 1:
        raise InputError("label_smoothing", f"must be at least 0 and less than 1, got {amount}.")
    if not amount:
        return task
    _check_minimizes_loss(task, "smoothed")

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        # Cross-entropy is linear in the target, so mix the two losses instead of the targets.
        to_uniform = -_mean_over_places(jax.nn.log_softmax(logits).mean(axis=-1))
        return (1 - amount) * task.loss(logits, labels) + amount * to_uniform

    return task._replace(objective=objective)


def focal(task: Task, gamma: float) -> Task:
    """Returns the task with the focal loss as the minimized objective (Lin et al., 2017).

    The cross-entropy of each label is multiplied by `(1 - p) ** gamma`, for the predicted
    probability p of the label, so that examples which are already classified well count less. The
    reported loss does not change. To weight classes as well, as the paper's alpha does, pass the
    result to `weighted`.

    Args:
        task: Task whose loss is `cross_entropy`, without another objective.
        gamma: Exponent, at least 0; the paper recommends 2, and 0 returns the task unchanged.

    Raises:
        InputError: The exponent is out of range, the loss of the task is another one, or the task
            has another objective.

    Examples:
        >>> task = ctde.tasks.focal(ctde.tasks.classification, gamma=2)
        >>> logits, labels = jax.numpy.array([[0.0, 0.0]]), jax.numpy.array([1])
        >>> loss, objective = task.loss(logits, labels), task.objective(logits, labels)
        >>> round(float(objective[0] / loss[0]), 3)
        0.25
    """
    if not 0 <= gamma < inf:
        raise InputError("focal_gamma", f"must be at least 0 and finite, got {gamma}.")
    if not gamma:
        return task
    if task.loss is not cross_entropy:
        raise InputError(
            "task",
            "must have the loss tasks.cross_entropy for the focal loss, such as "
            "tasks.classification, got another loss.",
        )
    _check_minimizes_loss(task, "focal")

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # 1 - p without cancellation. At 0, the gradient of a power below 1 would be infinite.
        missing = jnp.maximum(-jnp.expm1(-losses), jnp.finfo(losses.dtype).tiny)
        return _mean_over_places(missing**gamma * losses)

    return task._replace(objective=objective)


def weighted(task: Task, weights: Sequence[float] | Literal["balanced"], data: Dataset) -> Task:
    """Returns the task with the objective of each example multiplied by the weight of its class.

    The objective of a batch is `sum(weight * loss) / examples`, as with `class_weight` in Keras; it
    is not divided by the sum of the weights, as in PyTorch. The reported loss and the metrics do
    not change, so runs remain comparable.

    Args:
        task: Task whose labels are classes; another objective, such as that of `focal`, is kept.
        weights: Weight of each class, in the order of `data.classes`. Or `"balanced"`, as in
            scikit-learn: `examples / (classes * examples of the class)`, counted in the training
            split. Classes without training examples are not counted.
        data: Data set of the training.

    Raises:
        InputError: The labels are not classes, the weights are not one finite number of at least 0
            for each class, all of them are 0, or the examples come from a stream and cannot be
            counted.

    Examples:
        >>> x, y = np.zeros((8, 2)), np.array([0, 0, 0, 0, 0, 0, 1, 1])
        >>> data = ctde.data.from_arrays(x, y, x, y)
        >>> task = ctde.tasks.weighted(ctde.tasks.classification, "balanced", data)
        >>> objective = task.objective(jax.numpy.zeros((2, 2)), jax.numpy.array([0, 1]))
        >>> [round(float(value / np.log(2)), 3) for value in objective]
        [0.667, 2.0]
    """
    # A text has one label for each position, which are not the classes of examples.
    if not data.classes or data.train.labels.ndim != 1:
        raise InputError(
            "class_weights",
            "requires labels that are classes, one for each example; "
            f"{targets_or_classes(data.train.labels)}.",
        )
    # The type of `weights` is checked by its values, as an array must not be compared to a string.
    is_balanced = isinstance(weights, str) and weights == "balanced"
    values = _balanced(data) if is_balanced else _class_weights(weights, data.classes)
    inner = task.loss if task.objective is None else task.objective

    def objective(
        outputs: PyTree, labels: Int32[Array, " examples"]
    ) -> Float32[Array, " examples"]:
        unweighted = _per_example("objective", inner, outputs, labels)
        return jnp.asarray(values)[labels] * unweighted

    return task._replace(objective=objective)


def _balanced(data: Dataset) -> Float32[np.ndarray, " classes"]:
    """Returns the balanced weight of each class; 0 if it has no training examples."""
    data.check_arrays("class_weights")
    classes = len(data.classes)
    counts = sum(np.bincount(piece, minlength=classes) for _, piece in slices(data.train.labels))
    present = np.maximum(counts, 1) * np.count_nonzero(counts)
    return np.where(counts, len(data.train.labels) / present, 0).astype(np.float32)


def _class_weights(weights: Any, classes: Sequence[str]) -> Float32[np.ndarray, " classes"]:
    """Converts the weights of classes to an array.

    Raises:
        InputError: They are not one finite number of at least 0 for each class, or all are 0.
    """
    rule = f"must be balanced, or {len(classes)} numbers, one for each class"
    # A dictionary, as in Keras and scikit-learn, becomes an array of one object.
    try:
        values = np.asarray(weights, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError("class_weights", f"{rule}, got {quoted(weights)}.") from error
    if values.shape != (len(classes),):
        raise InputError("class_weights", f"{rule}, got {quoted(weights)}.")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.any()):
        raise InputError(
            "class_weights",
            f"must be finite, at least 0, and not all 0, got {quoted(values.tolist())}.",
        )
    return values


def _check_minimizes_loss(task: Task, name: str) -> None:
    """Raises InputError if the task has an objective, which the function `name` would replace."""
    if task.objective is not None:
        raise InputError(
            "task",
            f"must not have an objective yet, because {name} would replace it; pass "
            "tasks.classification or tasks.language_modeling, and apply weighted to the result.",
        )


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
