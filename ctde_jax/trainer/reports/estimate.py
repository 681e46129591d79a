"""Estimates of metrics, with bootstrap intervals (Efron, 1979)."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan, nan
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
"""Number of bootstrap resamples."""

SEED = 0
"""Random seed of the resamples, so that a report of the same predictions has the same intervals."""

LEVEL = 0.95
"""Confidence level of the intervals."""

_NAMED = 5
"""Maximum number of names in a sentence."""


class Estimate(NamedTuple):
    """A metric and its confidence interval, or the reason for which it is undefined.

    Examples:
        >>> from ctde_jax.trainer import Estimate
        >>> print(Estimate(0.9, 0.85, 0.94))
        0.9000 (0.8500 to 0.9400)
        >>> print(Estimate(reason="all examples have the class cat"))
        undefined: all examples have the class cat
    """

    value: float = nan
    """The metric on the split; NaN if it is undefined."""

    low: float = nan
    """Lower end of the 95 % interval; NaN without an interval."""

    high: float = nan
    """Upper end of the 95 % interval; NaN without an interval."""

    reason: str = ""
    """The reason for which the metric is undefined; empty if it is defined."""

    def __str__(self) -> str:
        if isnan(self.value):
            return f"undefined: {self.reason}"
        interval = "" if isnan(self.low) else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.value:.4f}{interval}"


def with_intervals(
    metrics: Mapping[str, Estimate],
    examples: int,
    resample: Callable[[Float[np.ndarray, " examples"]], Mapping[str, float]],
) -> dict[str, Estimate]:
    """Adds percentile bootstrap intervals to defined metrics.

    Resamples in which a metric is undefined, because they lack a class, do not count for it.

    Args:
        metrics: Estimates by name.
        examples: Number of examples; a single one has no interval.
        resample: Function that computes metrics by name, given the number of times that each
            example occurs in a resample.
    """
    if examples < 2:
        return dict(metrics)
    rng = np.random.default_rng(SEED)
    drawn = [
        resample(
            np.bincount(rng.integers(examples, size=examples), minlength=examples).astype(float)
        )
        for _ in range(RESAMPLES)
    ]

    def interval(name: str) -> tuple[float, float]:
        values = np.array([each[name] for each in drawn])
        defined = values[~np.isnan(values)]
        if not len(defined):
            return nan, nan
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    return {
        name: estimate
        if isnan(estimate.value) or name not in drawn[0]
        else Estimate(estimate.value, *interval(name))
        for name, estimate in metrics.items()
    }


def name_some(names: Sequence[str]) -> str:
    """Returns the first names as a phrase, with the number of the others."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
