"""Regression of targets, which a network standardizes and a task reports in their units."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32
from numpy.typing import ArrayLike

from ctde_jax.data import DiskArray, moments, plain
from ctde_jax.errors import InputError
from ctde_jax.models.tasks.task import Task, Units


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


def is_regression(task: Task) -> bool:
    """Returns whether a task with units is one of `regression_in`, whatever its objective."""
    assert task.units is not None
    # Such tasks differ in their units, which their functions contain.
    same = regression_in(task.units)
    has_its_loss = getattr(task.loss, "func", None) is _standardized_squared_error
    return has_its_loss and (task.names, task.metrics) == (same.names, same.metrics)


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
