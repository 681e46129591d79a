"""Figures of a report: a reliability diagram, and predictions over targets."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ctde_jax.trainer.reports.classes import BINS, Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_POINTS = 1000
"""Maximum number of points in a figure, which is part of the page as SVG."""

_COLOR = "tab:blue"


def reliability(calibration: Calibration) -> "Figure":
    """Draws accuracy and number of examples by confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    middles = (np.arange(BINS) + 0.5) / BINS
    width = 0.9 / BINS
    upper.bar(middles, np.nan_to_num(calibration.accuracy), width, color=_COLOR, alpha=0.75)
    upper.plot([0, 1], [0, 1], linestyle="--", color="tab:orange", label="perfect calibration")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(loc="upper left")
    lower.bar(middles, calibration.counts, width, color="tab:gray")
    lower.set(xlabel="confidence", ylabel="examples")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def predicted_over_true(
    targets: Float[np.ndarray, " examples"], predictions: Float[np.ndarray, " examples"]
) -> "Figure":
    """Draws predictions over targets, of at most 1,000 random examples."""
    from matplotlib.figure import Figure

    shown = np.random.default_rng(0).permutation(len(targets))[:_MOST_POINTS]
    both = np.concatenate([targets[shown], predictions[shown]])
    ends = [both.min(), both.max()]
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(ends, ends, linestyle="--", color="tab:orange", label="perfect prediction")
    axes.plot(
        targets[shown],
        predictions[shown],
        linestyle="",
        marker="o",
        markersize=4,
        markeredgewidth=0,
        alpha=0.6,
        color=_COLOR,
    )
    axes.set(xlabel="target", ylabel="prediction")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
