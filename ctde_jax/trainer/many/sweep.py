"""The results of many runs: a table of means and spreads, and curves with bands."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ctde_jax.checkpoint import CURVES
from ctde_jax.errors import writing_to
from ctde_jax.models import RESERVED
from ctde_jax.trainer import picture
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.many.family import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = "runs.csv"
"""File with a row for each run."""

_MOST_CURVES = 10
"""Maximum number of combinations in a figure, one for each color of matplotlib."""


@dataclass(frozen=True, repr=False)
class Sweep:
    """The results of many runs.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> args = {"seeds": range(3), "steps": 20, "show": False}
        >>> sweep = ctde.fit_many(model, data, optax.sgd(0.1), **args)
        >>> [row["seed"] for row in sweep.rows], sweep.summary[0]["runs"]
        ([0, 1, 2], 3)
    """

    outcomes: tuple[Outcome, ...]
    """The result of each run, in order."""

    def __repr__(self) -> str:
        failed = sum(outcome.trained is None for outcome in self.outcomes)
        return f"Sweep({len(self.outcomes)} runs{f', {failed} failed' if failed else ''})"

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training before its last step."""
        return any(each.trained is not None and each.trained.interrupted for each in self.outcomes)

    @property
    def rows(self) -> list[Row]:
        """A dict for each run: the values of the sweep, `seed`, `step`, and `failure`.

        A run that has not failed also has the loss and the metrics of each evaluated split at its
        step, such as `test_accuracy`.
        """
        return [
            {
                **outcome.values,
                "seed": outcome.seed,
                "step": outcome.step,
                **_measured(outcome),
                "failure": outcome.failure,
            }
            for outcome in self.outcomes
        ]

    @property
    def summary(self) -> list[Row]:
        """A dict for each combination of values of the sweep.

        It has the values, the number of `runs`, the number of them that `failed`, and `step`, the
        last step of any. For each loss and metric, such as `test_accuracy`, it also has a dict with
        `mean`, `sd` (the sample standard deviation, NaN for one run), `min` and `max` over the runs
        that have not failed.
        """
        lines: list[Row] = []
        for values, outcomes in self._groups:
            sound = [_measured(each) for each in outcomes if each.trained is not None]
            line: Row = {
                **values,
                "runs": len(outcomes),
                "failed": len(outcomes) - len(sound),
                "step": max(each.step for each in outcomes),
            }
            for name in sound[0] if sound else ():
                numbers = [each[name] for each in sound]
                line[name] = {
                    "mean": mean(numbers),
                    "sd": stdev(numbers) if len(numbers) > 1 else nan,
                    "min": min(numbers),
                    "max": max(numbers),
                }
            lines.append(line)
        return lines

    def table(self) -> Table:
        """Returns the `summary` as a table, with one line for each combination of values."""
        lines = self.summary
        metrics = dict.fromkeys(
            name for line in lines for name in line if isinstance(line[name], dict)
        )
        # Most sweeps have no failures, and no column of zeros.
        counts = ["runs", "failed"] if any(line["failed"] for line in lines) else ["runs"]
        # With halving or early stopping, the combinations may end at different steps.
        if len({line["step"] for line in lines}) > 1:
            counts.append("step")
        columns = [*self._groups[0][0], *counts, *metrics]
        table = Table(caption="mean ± standard deviation, and minimum to maximum, over the runs")
        for name in columns:
            table.add_column(name.replace("_", " "), justify="right")
        for line in lines:
            table.add_row(*(_in_cell(line.get(name)) for name in columns))
        return table

    def plot(self) -> "Figure":
        """Draws loss and metrics of the validation split, or the test split, over the steps.

        Each combination of values has a line, the mean of its runs, and a band of one standard
        deviation; at most ten combinations are drawn. The figure is not shown.
        """
        # Imported here, as only runs with a folder need matplotlib.
        from matplotlib.figure import Figure

        rows = [row for each in self.outcomes if each.trained for row in each.trained.history]
        split = "validation" if any(row["split"] == "validation" for row in rows) else "test"
        first = next(row for row in rows if row["split"] == split)
        names = [name for name in first if name not in RESERVED]
        figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for name, axes in zip(names, panels, strict=True):
            for values, outcomes in self._groups[:_MOST_CURVES]:
                steps, means, spreads = _band(outcomes, split, name)
                label = ", ".join(f"{key} {value}" for key, value in values.items())
                axes.plot(steps, means, label=label)
                axes.fill_between(steps, means - spreads, means + spreads, alpha=0.25)
            axes.set(xlabel="optimizer step", title=f"{split} {name}")
            axes.grid(alpha=0.3)
        # Without a sweep, there is one line, which needs no legend.
        if self._groups[0][0]:
            panels[0].legend()
        return figure

    def save(self, folder: Path) -> str:
        """Writes the rows to `runs.csv`, and the curves to `curves.png`.

        Returns:
            An empty string, or the reason if the curves could not be drawn or written.

        Raises:
            InputError: The folder cannot be written to.
        """
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with writing_to(folder), (folder / RUNS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns])
            writer.writeheader()
            writer.writerows(self.rows)
        return picture.save(self.plot, folder / CURVES)

    @property
    def _groups(self) -> list[tuple[Mapping[str, Any], list[Outcome]]]:
        """The outcomes of each combination of values; data sets are repetitions, as are seeds."""
        groups: list[tuple[Mapping[str, Any], list[Outcome]]] = []
        for outcome in self.outcomes:
            values = outcome.combination
            outcomes = next((outcomes for found, outcomes in groups if found == values), None)
            if outcomes is None:
                groups.append((values, [outcome]))
            else:
                outcomes.append(outcome)
        return groups


def _measured(outcome: Outcome) -> dict[str, float]:
    """Returns loss and metrics of each evaluated split at the step of the result."""
    trained = outcome.trained
    if trained is None:
        return {}
    rows = [row for row in trained.history if row["step"] == trained.step]
    return {
        f"{row['split']}_{name}": value
        for row in rows
        if row["split"] != "train"
        for name, value in row.items()
        if name not in RESERVED
    }


def _band(
    outcomes: Sequence[Outcome], split: str, name: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns the steps of evaluations, and mean and standard deviation of a metric at each."""
    points: dict[int, list[float]] = {}
    for outcome in outcomes:
        for row in outcome.trained.history if outcome.trained else ():
            if row["split"] == split:
                points.setdefault(row["step"], []).append(row[name])
    spreads = [stdev(each) if len(each) > 1 else 0.0 for each in points.values()]
    return [*points], np.array([*map(mean, points.values())]), np.array(spreads)


def _in_cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return str(value)
    if isnan(value["sd"]):
        return f"{value['mean']:.4f}"
    span = f"{value['min']:.4f} to {value['max']:.4f}"
    return f"{value['mean']:.4f} ± {value['sd']:.4f}\n{span}"
