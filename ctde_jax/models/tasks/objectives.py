"""Objectives that are minimized instead of the reported loss: smoothed, focal, weighted."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from ctde_jax.data import Dataset, slices, targets_or_classes
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_fraction, check_not_negative, is_zero, quoted
from ctde_jax.models.tasks.task import Task, cross_entropy, mean_over_places, per_example


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
    if not is_zero(amount) and task.predicts == "targets":
        raise InputError(
            "label_smoothing", f"must be 0 if the task predicts no classes, got {amount}."
        )
    # At 1 the objective would not depend on the labels.
    check_fraction(label_smoothing=amount)
    if is_zero(amount):
        return task
    _check_minimizes_loss(task, "smoothed")

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        # Cross-entropy is linear in the target, so mix the two losses instead of the targets.
        to_uniform = -mean_over_places(jax.nn.log_softmax(logits).mean(axis=-1))
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
    check_not_negative(focal_gamma=gamma)
    if not gamma:
        return task
    _check_is_cross_entropy(task, "the focal loss")
    _check_minimizes_loss(task, "focal")

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # 1 - p without cancellation. At 0, the gradient of a power below 1 would be infinite.
        missing = jnp.maximum(-jnp.expm1(-losses), jnp.finfo(losses.dtype).tiny)
        return mean_over_places(missing**gamma * losses)

    return task._replace(objective=objective)


def calibrated(task: Task, counts: Sequence[int] | np.ndarray) -> Task:
    """Returns the task with calibrated logits in the minimized objective (Zhang et al., 2022).

    The logarithm of the frequency of each class among the examples of a node is added to the
    logits. The node then need not learn how frequent its classes are, which differs from node to
    node and would pull their models apart. The reported loss does not change.

    Args:
        task: Task whose loss is `cross_entropy`, without another objective.
        counts: Number of examples of each class, `int[classes]`; 1 is added to each, so a class
            without examples is possible.

    Raises:
        InputError: A count is negative, the loss of the task is another one, or the task has
            another objective.

    Examples:
        >>> labels = ctde.data.digits().train.labels[:100]
        >>> counts = np.bincount(labels, minlength=10)
        >>> task = ctde.tasks.calibrated(ctde.tasks.classification, counts)
    """
    frequencies = np.asarray(counts, np.float64) + 1
    if not (frequencies >= 1).all():
        raise InputError("counts", f"must not be negative, got {min(counts)}.")
    _check_is_cross_entropy(task, "calibrated logits")
    _check_minimizes_loss(task, "calibrated")
    offsets = np.log(frequencies / frequencies.sum()).astype(np.float32)

    def objective(
        logits: Float[Array, "examples ... classes"], labels: Int32[Array, "examples ..."]
    ) -> Float32[Array, " examples"]:
        return cross_entropy(logits + jnp.expand_dims(offsets, range(logits.ndim - 1)), labels)

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
        unweighted = per_example("objective", inner, outputs, labels)
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


def _check_is_cross_entropy(task: Task, purpose: str) -> None:
    """Raises InputError unless the loss of the task is the cross-entropy."""
    if task.loss is not cross_entropy:
        raise InputError(
            "task",
            f"must have the loss tasks.cross_entropy for {purpose}, such as tasks.classification, "
            "got another loss.",
        )


def _check_minimizes_loss(task: Task, name: str) -> None:
    """Raises InputError if the task has an objective, which the function `name` would replace."""
    if task.objective is not None:
        raise InputError(
            "task",
            f"must not have an objective yet, because {name} would replace it; pass "
            "tasks.classification or tasks.language_modeling, and apply weighted to the result.",
        )
