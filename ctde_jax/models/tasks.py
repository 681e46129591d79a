"""Tasks of a model: a loss and metrics, each of which returns one number for each example.

The caller sums them and divides by the number of examples, so averages are correct for any split
into batches and devices.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import exp, inf, isnan, log, nan, sqrt
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped
from numpy.typing import ArrayLike

from ctde_jax.data import Dataset, DiskArray, moments, plain, slices, targets_or_classes
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_known, quoted
from ctde_jax.models.user_code import reported

PerExample = Callable[[PyTree, Shaped[Array, "examples ..."]], Float32[Array, " examples"]]
"""`function(outputs, labels) -> values`; each leaf of `outputs` is `[examples, ...]`."""

Name = Literal["auto", "classification", "language_modeling", "multilabel", "regression"]

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
        InputError: The amount is out of range, or the task predicts no classes or has another
            objective.

    Examples:
        >>> task = ctde.tasks.smoothed(ctde.tasks.classification, 0.1)
        >>> task.names
        ('loss', 'accuracy')
    """
    if amount and task.predicts == "targets":
        raise InputError(
            "label_smoothing", f"must be 0 if the task predicts no classes, got {amount}."
        )
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
        "bits_per_character": lambda averages: averages["loss"] / log(2),
        "perplexity": lambda averages: exp(min(averages["loss"], LARGEST_LOSS)),
    },
    predicts="tokens",
    lower_is_better=("bits_per_character", "perplexity"),
)
"""Next-token prediction: a window is one example, and all its positions have equal weight."""


def _label_losses(
    logits: Float[Array, "examples labels"], labels: Int32[Array, "examples labels"]
) -> Float32[Array, " examples"]:
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean(axis=1)


def _hits(
    logits: Float[Array, "examples labels"], labels: Int32[Array, "examples labels"]
) -> Float32[Array, "examples labels"]:
    # A NaN is neither above 0 nor below, so it is never correct.
    return jnp.where(labels == 1, logits > 0, logits <= 0).astype(jnp.float32)


multilabel = Task(
    _label_losses,
    {
        "accuracy": lambda logits, labels: _hits(logits, labels).mean(axis=1),
        "exact_match": lambda logits, labels: _hits(logits, labels).min(axis=1),
    },
    predicts="targets",
)
"""Any number of labels per example, `int32[examples, labels]`, each 0 or 1.

The model returns one logit for each label; its label is 1 if the logit is positive. `accuracy` is
the fraction of correct labels, and `exact_match` that of examples whose labels are all correct.
"""

BY_NAME = {
    "classification": classification,
    "language_modeling": language_modeling,
    "multilabel": multilabel,
}
"""Tasks that do not depend on the data; that of `regression` does."""


def regression(targets: ArrayLike | DiskArray) -> Task:
    """Returns the task of regression, with the mean and standard deviation of training targets.

    The network is trained on standardized targets; the outputs of the model are in the units of the
    targets. The loss is the mean over the targets of the squared error, in units of the variance
    of each target. The task reports the mean absolute error (`mae`), the root mean squared error
    (`rmse`) and the coefficient of determination (`r2`), each averaged over the targets. `r2` is 0
    if a target is equal in all examples.

    Args:
        targets: Targets of the training split, `[examples]` or `[examples, targets]`.

    Raises:
        InputError: The targets are not floats of this shape, or a target is equal in all examples.

    Examples:
        >>> task = ctde.tasks.regression(np.array([[1.0], [2.0], [6.0]], np.float32))
        >>> task.names
        ('loss', 'mae', 'rmse', 'r2')
        >>> task.units.mean, task.loss(np.ones((1, 1)), np.ones(1))
        (array([[3.]], dtype=float32), Array([0.], dtype=float32))
    """
    targets = plain("targets", targets)
    if targets.dtype.kind != "f" or targets.ndim not in (1, 2):
        raise InputError(
            "task",
            "must be regression only if targets are floats of the shape [examples] or [examples, "
            f"targets], got {targets.dtype} {list(targets.shape)}; pass y_train.astype('float32').",
        )
    mean, deviation = (each.astype(np.float32).reshape(1, -1) for each in moments(targets))
    if not deviation.all():
        place = int(deviation.argmin())
        raise InputError(
            "task",
            f"must have targets that vary, but target {place} of regression is "
            f"{mean[0, place]:g} in all training examples; remove it.",
        )
    return regression_in(Units(mean, deviation))


def regression_in(units: Units) -> Task:
    """Returns the task of `regression` for targets in these units.

    Examples:
        >>> ctde.tasks.regression_in(ctde.tasks.Units(np.zeros((1, 1)), np.ones((1, 1)))).names
        ('loss', 'mae', 'rmse', 'r2')
    """
    count = units.mean.size

    # Moments of standardized targets, whose mean is near 0, so that the variance does not cancel.
    of_targets = {
        f"{name} of target {place}": partial(_moment, function, units, place)
        for name, function in _MOMENTS.items()
        for place in range(count)
    }
    return Task(
        loss=partial(_standardized_squared_error, units),
        metrics={"mae": _absolute_error},
        derived={"rmse": partial(_rmse, units.deviation[0].tolist()), "r2": partial(_r2, count)},
        moments=of_targets,
        predicts="targets",
        lower_is_better=("mae", "rmse"),
        units=units,
    )


def name_of(task: Task) -> str | None:
    """Returns the name of a task of this module, whatever its objective; None for other tasks.

    Examples:
        >>> ctde.tasks.name_of(ctde.tasks.smoothed(ctde.tasks.classification, 0.1))
        'classification'
    """
    reported = task._replace(objective=None)
    if task.units is not None:
        # Tasks of regression differ in their units, which their functions contain.
        same = regression_in(task.units)
        is_same = getattr(task.loss, "func", None) is _standardized_squared_error
        is_same &= (task.names, task.metrics) == (same.names, same.metrics)
        return "regression" if is_same else None
    return next((name for name, known in BY_NAME.items() if reported == known), None)


def for_data(data: Dataset, name: Name = "auto") -> Task:
    """Returns a task by name.

    Args:
        data: Data set, whose training targets determine the units of regression.
        name: `classification`, `language_modeling`, `multilabel` or `regression`; `auto` is
            language modeling if the data are a text, and classification if the labels are classes.

    Raises:
        InputError: The name is unknown, or the labels are unsuitable for the task.

    Examples:
        >>> ctde.tasks.for_data(ctde.data.digits()) is ctde.tasks.classification
        True
    """
    check_known("task", name, get_args(Name))
    labels = data.train.labels
    if name == "auto":
        if not data.vocabulary and not data.classes:
            raise InputError(
                "task",
                "must be given, as 'regression' or Task(loss), unless labels are classes or a "
                f"text; {targets_or_classes(labels)}.",
            )
        return language_modeling if data.vocabulary else classification
    if name == "multilabel":
        _check_binary(data)
    if name != "regression":
        return BY_NAME[name]

    # Class numbers are not measurements, and the first batch of a stream has no fixed mean.
    if data.classes or data.vocabulary:
        raise InputError(
            "task",
            f"must not be regression for {data.name}, whose labels are {data.kinds}; pass targets "
            "as floats.",
        )
    if data.stream is not None:
        raise InputError(
            "task",
            "must not be 'regression' if batches come from an iterable; pass "
            "tasks.regression(targets), with an array of training targets.",
        )
    return regression(labels)


def _check_binary(data: Dataset) -> None:
    """Raises InputError unless all labels are 0 or 1, `int32[examples, labels]`."""
    splits = [split for split in (data.train, data.validation, data.test) if split]
    for labels in (np.asarray(split.labels) for split in splits):
        if (
            labels.ndim != 2
            or labels.dtype != np.int32
            or not ((labels == 0) | (labels == 1)).all()
        ):
            raise InputError(
                "task",
                "must be multilabel only if labels are 0 or 1, of the shape [examples, labels], "
                f"got {labels.dtype} {list(labels.shape)} from {labels.min():g} to "
                f"{labels.max():g}.",
            )


def _errors(
    outputs: Float[Array, "examples targets"], targets: Float32[Array, "examples ..."]
) -> Float32[Array, "examples targets"]:
    return outputs - targets.reshape(outputs.shape)


def _standardized_squared_error(
    units: Units, outputs: Float[Array, "examples targets"], targets: Float32[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    return jnp.square(_errors(outputs, targets) / units.deviation).mean(axis=1)


def _absolute_error(
    outputs: Float[Array, "examples targets"], targets: Float32[Array, "examples ..."]
) -> Float32[Array, " examples"]:
    return jnp.abs(_errors(outputs, targets)).mean(axis=1)


_MOMENTS: Mapping[str, Callable[..., Float32[Array, " examples"]]] = {
    "squared error": lambda output, target: jnp.square(output - target),
    "mean": lambda output, target: target,
    "square": lambda output, target: jnp.square(target),
}
"""Functions of one standardized output and target, whose averages give `rmse` and `r2`."""


def _moment(
    function: Callable[..., Float32[Array, " examples"]],
    units: Units,
    place: int,
    outputs: Float[Array, "examples targets"],
    targets: Float32[Array, "examples ..."],
) -> Float32[Array, " examples"]:
    target = targets.reshape(outputs.shape)[:, place]
    mean = units.mean[0, place]
    deviation = units.deviation[0, place]
    return function((outputs[:, place] - mean) / deviation, (target - mean) / deviation)


def _rmse(deviations: Sequence[float], averages: Mapping[str, float]) -> float:
    roots = [
        deviation * sqrt(averages[f"squared error of target {place}"])
        for place, deviation in enumerate(deviations)
    ]
    return sum(roots) / len(roots)


def _r2(count: int, averages: Mapping[str, float]) -> float:
    def of_target(place: int) -> float:
        variance = averages[f"square of target {place}"] - averages[f"mean of target {place}"] ** 2
        # Equal targets have no variance, except for rounding.
        if variance <= 1e-6 * averages[f"square of target {place}"]:
            return 0.0
        return 1 - averages[f"squared error of target {place}"] / variance

    return sum(map(of_target, range(count))) / count
