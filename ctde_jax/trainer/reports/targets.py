"""Metrics of a regression: errors and the coefficient of determination."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan

import numpy as np
from jaxtyping import Float

from ctde_jax.trainer.reports.estimate import Estimate, name_some, with_intervals


@dataclass(frozen=True)
class TargetMetrics:
    """Metrics of a regression, over all examples of a split and for each output.

    R² is NaN for an output whose targets are constant.
    """

    metrics: Mapping[str, Estimate]
    """Estimates by name: the mean `loss` of the task; `mae`, `rmse` and `r2` with intervals.

    The last three are means over the outputs.
    """

    mae: Float[np.ndarray, " outputs"]
    """Mean absolute error."""

    rmse: Float[np.ndarray, " outputs"]
    """Square root of the mean squared error."""

    r2: Float[np.ndarray, " outputs"]
    """Coefficient of determination, R²."""

    targets: Float[np.ndarray, "examples outputs"]
    """Labels; all axes of an example are flattened."""

    predictions: Float[np.ndarray, "examples outputs"]
    """Outputs, like the targets."""


def measure_targets(
    predictions: Float[np.ndarray, "examples outputs"],
    targets: Float[np.ndarray, "examples outputs"],
    loss: float,
) -> TargetMetrics:
    """Computes the metrics of a regression.

    Args:
        predictions: Finite outputs of the model.
        targets: Finite labels.
        loss: Mean loss of the task.
    """
    # Imported here, as the import takes a second.
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    predictions = predictions.astype(np.float64)
    targets = targets.astype(np.float64)
    mae = np.asarray(mean_absolute_error(targets, predictions, multioutput="raw_values"))
    rmse = np.asarray(root_mean_squared_error(targets, predictions, multioutput="raw_values"))

    # scikit-learn returns 0 or 1 for constant targets, for which R² is undefined.
    varies = np.ptp(targets, axis=0) > 0
    r2 = np.full(len(varies), nan)
    if varies.any():
        r2[varies] = r2_score(targets[:, varies], predictions[:, varies], multioutput="raw_values")
    constant = name_some([str(place) for place in np.flatnonzero(~varies)])
    which = f" of output {constant}" if len(varies) > 1 else ""
    metrics = {
        "loss": Estimate(loss),
        "mae": Estimate(float(mae.mean())),
        "rmse": Estimate(float(rmse.mean())),
        "r2": Estimate(float(r2.mean()))
        if varies.all()
        else Estimate(reason=f"the targets{which} are constant"),
    }
    return TargetMetrics(
        with_intervals(metrics, len(targets), _resampler(predictions, targets)),
        mae,
        rmse,
        r2,
        targets,
        predictions,
    )


def _resampler(
    predictions: Float[np.ndarray, "examples outputs"],
    targets: Float[np.ndarray, "examples outputs"],
) -> Callable[[Float[np.ndarray, " examples"]], dict[str, float]]:
    """Returns the function that computes the metrics with intervals for a resample."""
    examples = len(targets)
    absolute = np.abs(predictions - targets)
    squared = np.square(predictions - targets)
    # Relative to the mean over all examples, so that a large mean causes no cancellation.
    centered = targets - targets.mean(axis=0)
    centered_squared = np.square(centered)

    def resample(counts: Float[np.ndarray, " examples"]) -> dict[str, float]:
        residual = counts @ squared
        total = counts @ centered_squared - np.square(counts @ centered) / examples
        varies = total > 1e-12 * (counts @ centered_squared)
        ratio = np.divide(residual, total, out=np.full(len(total), nan), where=varies)
        return {
            "mae": float(np.mean(counts @ absolute / examples)),
            "rmse": float(np.mean(np.sqrt(residual / examples))),
            "r2": float(np.mean(1 - ratio)),
        }

    return resample
