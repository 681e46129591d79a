"""The learning rate finder: the loss of short runs at growing learning rates, by one program.

Unlike a single run whose learning rate grows (Smith, 2017), each rate has a separate run, so that
the state of the optimizer at one rate does not depend on smaller ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.table import Table

from ctde_jax.trainer.many.family import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = [float(f"{rate:.4g}") for rate in np.geomspace(1e-5, 10, 25)]
"""The learning rates that are compared: four in each decade."""

STEPS = 100
"""Number of steps of each run; rounds of local steps may need more."""

_NEAR_BEST = 0.25  # distance to the lowest loss, relative to it


class Tried(NamedTuple):
    """The result of a short run."""

    rate: float
    loss: float
    """Mean training loss over the last fifth of the steps; infinite if the run failed."""


@dataclass(frozen=True)
class Comparison:
    """The results at all learning rates, in increasing order; at least one run has not failed."""

    tried: Sequence[Tried]
    steps: int
    """Number of steps of each run."""

    @property
    def best(self) -> Tried:
        """The result with the lowest loss."""
        return min(self.tried, key=lambda each: each.loss)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest rate whose loss is within 25% of the lowest."""
        limit = self.best.loss + _NEAR_BEST * abs(self.best.loss)
        near = [each.rate for each in self.tried if each.loss <= limit]
        return min(near), max(near)


def compare(outcomes: Sequence[Outcome], steps: int) -> Comparison:
    """Compares the runs by their training loss.

    Args:
        outcomes: The result of each run, whose values contain `learning_rate`.
        steps: Number of steps of each run.
    """
    tried = [
        Tried(outcome.values["learning_rate"], _last_loss(outcome, steps)) for outcome in outcomes
    ]
    return Comparison(tried, steps)


def _last_loss(outcome: Outcome, steps: int) -> float:
    """Returns the mean training loss over the last fifth of the steps."""
    if outcome.trained is None:
        return inf
    rows = [row for row in outcome.trained.history if row["split"] == "train"]
    last = [row for row in rows if row["step"] > 0.8 * steps] or rows[-1:]
    examples = sum(row["examples"] for row in last)
    return sum(row["loss"] * row["examples"] for row in last) / examples


def advice(comparison: Comparison) -> list[str]:
    """Returns the learning rate that was found, and a caution.

    Args:
        comparison: The comparison.
    """
    best = comparison.best
    low, high = comparison.range
    near = f"; from {low:.3g} to {high:.3g}, it is within {_NEAR_BEST:.0%} of that" * (low < high)
    return [
        f"Of the compared learning rates, {best.rate:.3g} has the lowest training loss after "
        f"{comparison.steps} steps, {best.loss:.4g}{near}.",
        "Short runs favor large learning rates. Compare whole runs before you decide: "
        f"--sweep learning-rate={best.rate / 3:.3g},{best.rate:.3g} --seeds 4.",
    ]


def table(comparison: Comparison, title: str) -> Table:
    """Returns a table of the loss at each learning rate.

    Args:
        comparison: The comparison.
        title: Model, data and devices, for the title of the table.
    """
    shown = Table(title=f"loss by learning rate, {title}", title_justify="left")
    shown.add_column("learning rate", justify="right")
    shown.add_column(f"training loss after {comparison.steps} steps", justify="right")
    for each in comparison.tried:
        loss = f"{each.loss:.4f}" if isfinite(each.loss) else "not finite"
        shown.add_row(f"{each.rate:.3g}", loss)
    return shown


def plot(comparison: Comparison, title: str) -> "Figure":
    """Plots the loss over the learning rate.

    Args:
        comparison: The comparison.
        title: Title of the figure.

    Returns:
        The figure, which pyplot does not manage.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    sound = [each for each in comparison.tried if isfinite(each.loss)]
    rates = [each.rate for each in sound]
    axes.plot(rates, [each.loss for each in sound], marker="o", label="training loss")
    best = comparison.best
    low, high = comparison.range
    axes.axvspan(low, high, color="tab:gray", alpha=0.2, label="within 25% of the lowest")
    axes.plot(
        best.rate,
        best.loss,
        "o",
        color="tab:orange",
        markersize=10,
        label=f"lowest: {best.rate:.3g}",
    )

    # Losses of large rates would hide the others. The loss of a density model may be negative.
    axes.set_xscale("log")
    if best.loss > 0:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * best.loss, 2 * max(sound[0].loss, best.loss))
    axes.set(
        title=title,
        xlabel="learning rate",
        ylabel=f"training loss after {comparison.steps} steps",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
