"""Tables of a report, which its text and its page share: names, numbers, rows and notes."""

from collections.abc import Mapping
from math import isnan

import numpy as np

from ctde_jax.trainer.reports.classes import ClassMetrics
from ctde_jax.trainer.reports.estimate import LEVEL, RESAMPLES, SEED, Estimate
from ctde_jax.trainer.reports.targets import TargetMetrics

MISSING = "\N{EN DASH}"  # stands for an undefined value
"""Cell of an undefined value."""

_TITLES = {
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "auroc": "AUROC",
    "calibration_error": "expected calibration error",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
}
"""Titles of metrics whose names need more than spaces."""


def title(name: str) -> str:
    """Returns the title of a metric."""
    return _TITLES.get(name, name.replace("_", " "))


def number(value: float) -> str:
    """Returns a number with four decimal places or digits, or `MISSING` if it is NaN."""
    if isnan(value):
        return MISSING
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.4g}"


def interval(estimate: Estimate) -> str:
    """Returns the interval of an estimate; empty without an interval."""
    return "" if isnan(estimate.low) else f"{number(estimate.low)} to {number(estimate.high)}"


def details(numbers: ClassMetrics | TargetMetrics) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table of the classes, or of several outputs.

    There are no rows if there is one output.
    """
    if isinstance(numbers, TargetMetrics):
        header = ["output", "MAE", "RMSE", "R²"]
        columns = (numbers.mae, numbers.rmse, numbers.r2)
        names = [str(place) for place in range(len(numbers.mae))]
        rows = [
            [name, *map(number, row)] for name, row in zip(names, np.stack(columns, 1), strict=True)
        ]
        return header, rows if len(rows) > 1 else []

    header = ["class", "precision", "recall", "F1", "AUROC", "average precision", "examples"]
    columns = (numbers.precision, numbers.recall, numbers.f1, numbers.auroc)
    values = np.stack([*columns, numbers.average_precision], axis=1)
    rows = [
        [name, *map(number, row), f"{support:,}"]
        for name, row, support in zip(numbers.classes, values, numbers.support, strict=True)
    ]
    return header, rows


def notes(numbers: ClassMetrics | TargetMetrics) -> list[str]:
    """Returns sentences on undefined values and on the intervals."""
    metrics: Mapping[str, Estimate] = numbers.metrics
    sentences = [
        f"{_capitalized(title(name))} is undefined: {estimate.reason}."
        for name, estimate in metrics.items()
        if isnan(estimate.value)
    ]
    if isinstance(numbers, ClassMetrics):
        sentences += numbers.notes
    if any(not isnan(estimate.low) for estimate in metrics.values()):
        sentences.append(
            f"Intervals are percentiles of {RESAMPLES:,} bootstrap resamples of the examples "
            f"(level {LEVEL:.0%}, seed {SEED}); they do not cover the randomness of training."
        )
    return sentences


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
