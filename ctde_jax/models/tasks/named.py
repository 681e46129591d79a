"""The tasks that have names, and the choice of one for a data set."""

from math import exp, log
from typing import Literal, get_args

import numpy as np
import optax
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from ctde_jax.data import Dataset, targets_or_classes
from ctde_jax.errors import InputError, check_known
from ctde_jax.models.tasks.targets import is_regression, regression
from ctde_jax.models.tasks.task import Task, cross_entropy, is_correct

Name = Literal["auto", "classification", "language_modeling", "multilabel", "regression"]

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


def name_of(task: Task) -> str | None:
    """Returns the name of a task, whatever its objective; None for other tasks.

    Examples:
        >>> ctde.tasks.name_of(ctde.tasks.smoothed(ctde.tasks.classification, 0.1))
        'classification'
    """
    if task.units is not None:
        return "regression" if is_regression(task) else None
    reported = task._replace(objective=None)
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
