"""The report on a trained model: numbers of a split, as a value, as text and as a page."""

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isnan
from pathlib import Path

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float, Shaped
from rich.console import Console
from rich.table import Table

from ctde_jax.data import Split
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, on_one_line
from ctde_jax.models import Task, describe
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.reports import page, tables
from ctde_jax.trainer.reports.classes import ClassMetrics, log_softmax, measure_classes
from ctde_jax.trainer.reports.estimate import LEVEL, Estimate
from ctde_jax.trainer.reports.sections import make_sections
from ctde_jax.trainer.reports.targets import TargetMetrics, measure_targets
from ctde_jax.trainer.reports.worst import WorstExample, describe_numbers, highest

_PACKAGES = ("ctde_jax", "jax", "flax", "optax", "numpy", "scikit-learn")

_MOST_CLASSES = 4096
"""Maximum number of classes, at which the confusion matrix takes 128 MiB."""

_ROWS = 40
"""Maximum number of classes or outputs in the text of a report."""

_CONFUSION = 5
"""Maximum number of classes whose confusion matrix is in the text of a report."""

_COLUMNS = 100


@dataclass(frozen=True, repr=False)
class Report:
    """Metrics of a trained model on a split, with figures; `Trained.report` makes it.

    `print(report)` shows tables, a notebook shows the page, and `save` writes it to a file.
    """

    numbers: ClassMetrics | TargetMetrics
    """Metrics of a classifier, or of a regression."""

    worst: tuple[WorstExample, ...]
    """The examples with the highest loss, in descending order."""

    examples: int
    """Number of examples of the split."""

    step: int
    """Number of optimizer steps of the parameters."""

    history: Sequence[Row]
    """The rows of the training, for its curves."""

    plan: tuple[tuple[str, str], ...]
    """Rows of the plan of the training."""

    versions: Mapping[str, str]
    """Versions of Python and of packages when the report was made."""

    @property
    def metrics(self) -> Mapping[str, Estimate]:
        """Estimates over all examples, by name."""
        return self.numbers.metrics

    def __repr__(self) -> str:
        main = {name: value for name, value in self.metrics.items() if not isnan(value.low)}
        metrics = ", ".join(f"{name} {value.value:.4g}" for name, value in main.items())
        return f"Report({self.examples:,} examples, {metrics})"

    def __str__(self) -> str:
        screen = Console(
            file=io.StringIO(), width=_COLUMNS, color_system=None, markup=False, highlight=False
        )
        with screen.capture() as captured:
            for part in _text(self):
                screen.print(part)
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        summary = f"{self.examples:,} examples, parameters after {self.step:,} optimizer steps"
        sections = make_sections(self.numbers, self.worst, self.history, self.plan, self.versions)
        return page.fragment(self._heading, summary, sections)

    @property
    def _heading(self) -> str:
        row = dict(self.plan).get("data", "")
        data = row.rpartition(":")[0] or row
        return f"Report on {data}" if data else "Report"

    def save(self, path: Path | str) -> Path:
        """Writes the report as one HTML file, which refers to no other file or address.

        Args:
            path: File to write, such as `report.html`; an existing file is replaced.

        Returns:
            The path.

        Raises:
            InputError: The file cannot be written.

        Examples:
            >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
            >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
            >>> trained.report(data.test).save("report.html").name
            'report.html'
        """
        path = Path(path).expanduser()
        content = page.document(self._heading, self._repr_html_())
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise InputError(
                "path",
                f"must be a writable file, but writing to {path} failed: {error.strerror}.",
            ) from error
        return path


def make_report(
    task: Task,
    outputs: PyTree,
    split: Split,
    classes: tuple[str, ...],
    step: int,
    history: Sequence[Row],
    plan: tuple[tuple[str, str], ...],
) -> Report:
    """Measures outputs of a model.

    Args:
        task: Task of the model.
        outputs: Outputs for the inputs of the split.
        split: At least one example.
        classes: Names of the classes; empty if the labels are targets.
        step: Number of optimizer steps of the parameters.
        history: Rows of the training.
        plan: Rows of the plan of the training.

    Raises:
        InputError: The task predicts neither classes nor targets, or an output is not finite.
    """
    labels = np.asarray(split.labels)
    outputs = _checked(task, outputs, labels)
    losses = np.asarray(task.loss(jnp.asarray(outputs), jnp.asarray(labels)), np.float64)
    places = highest(losses)

    # The labels of the worst examples, and their predictions.
    if task.predicts == "classes":
        numbers = measure_classes(outputs, labels, classes)
        of_worst = outputs[places]
        probabilities = np.exp(log_softmax(of_worst).max(axis=1)).tolist()
        shown = [classes[label] for label in labels[places]]
        predicted = [classes[place] for place in of_worst.argmax(axis=1)]
    else:
        flat = outputs.reshape(len(labels), -1)
        numbers = measure_targets(flat, labels.reshape(flat.shape), float(losses.mean()))
        probabilities = [None] * len(places)
        shown = [describe_numbers(labels[place]) for place in places]
        predicted = [describe_numbers(outputs[place]) for place in places]

    # Inputs on disk are read for the worst examples alone.
    inputs = split.inputs[places]
    rows = zip(
        places.tolist(),
        losses[places].tolist(),
        shown,
        predicted,
        probabilities,
        inputs,
        strict=True,
    )
    worst = tuple(WorstExample(*row) for row in rows)
    return Report(numbers, worst, len(labels), step, tuple(history), plan, _versions())


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}}


def check_task(task: Task, classes: tuple[str, ...]) -> None:
    """Checks that the outputs of a task can be reported, without computing them.

    Args:
        task: Task of the model.
        classes: Names of the classes; empty if the labels are targets.

    Raises:
        InputError: It predicts tokens, the meaning of its outputs is not known, or there are too
            many classes.
    """
    if task.predicts == "tokens":
        raise InputError(
            "task",
            "must predict classes or targets for a report, got a language model; "
            "trained.evaluate(split) returns its loss, bits per character and perplexity.",
        )
    if task.predicts == "anything" and classes:
        raise InputError(
            "task",
            "must have predicts='classes' for a report on class labels, which states that outputs "
            "are logits, got predicts='anything'; pass Task(loss, metrics, predicts='classes').",
        )
    if len(classes) > _MOST_CLASSES:
        raise InputError(
            "trained",
            f"must have at most {_MOST_CLASSES:,} classes for a report, whose confusion matrix has "
            f"a row and a column for each, got {len(classes):,}; use trained.evaluate(split).",
        )


def _checked(
    task: Task, outputs: PyTree, labels: Shaped[np.ndarray, "examples ..."]
) -> Float[np.ndarray, "examples ..."]:
    """Returns the outputs, if they are finite logits or predictions of the labels."""
    if task.predicts != "classes":
        _check_targets(task, outputs, labels)
    if not np.isfinite(outputs).all():
        example = int(np.argwhere(~np.isfinite(outputs))[0][0])
        raise InputError(
            "trained",
            f"must have finite outputs for a report, got NaN or infinity for example {example}; "
            "lower the learning rate, and train again.",
        )
    return outputs


_CHECKED = 64
"""Number of examples for which the loss is examined."""


def _check_targets(task: Task, outputs: PyTree, labels: Shaped[np.ndarray, "examples ..."]) -> None:
    """Checks that outputs are predictions of the labels, and not parameters of a distribution.

    Then they have the shape of the labels, and the loss is lowest if they equal the labels.

    Raises:
        InputError: The shapes or the loss contradict that.
    """
    # Outputs [examples, 1] are predictions of labels [examples].
    way_out = "use trained.evaluate(split)"
    is_like = hasattr(outputs, "shape") and outputs.shape in (
        labels.shape,
        (*labels.shape, 1) if labels.ndim == 1 else labels.shape,
    )
    if labels.dtype.kind != "f" or not is_like:
        raise InputError(
            "task",
            "must predict float targets in outputs of the same shape for a report, got outputs "
            f"{describe(outputs)} for labels {describe(labels)}; {way_out}.",
        )

    # Compare the loss of the labels with that of outputs around them.
    few = jnp.asarray(labels[:_CHECKED])
    perfect = few.reshape(len(few), *outputs.shape[1:])
    least = np.asarray(task.loss(perfect, few))
    spread = float(labels.std()) or 1.0
    for shift in (-spread, -spread / 4, spread / 4, spread):
        is_higher = np.asarray(task.loss(perfect + shift, few)) > least
        if not is_higher.all():
            raise InputError(
                "task",
                "must have a loss that is lowest if the outputs equal the labels for a report, "
                "which regards them as predictions, but the loss of example "
                f"{int(is_higher.argmin())} is not higher at its label {shift:+.3g}; {way_out}.",
            )


def _text(report: Report) -> Iterable[str | Table]:
    """Yields the parts of the text: a line, metrics, classes or outputs, and confusions."""
    yield f"{report.examples:,} examples, parameters after {report.step:,} steps"
    table = _table(["metric", "value", f"{LEVEL:.0%} interval"])
    for name, estimate in report.metrics.items():
        table.add_row(tables.title(name), tables.number(estimate.value), tables.interval(estimate))
    yield table

    # One row for each class or output, then sentences on missing values.
    header, rows = tables.details(report.numbers)
    if rows:
        table = _table(header)
        for row in rows[:_ROWS]:
            table.add_row(*map(on_one_line, row))
        yield table
    if isinstance(report.numbers, ClassMetrics) and len(report.numbers.classes) <= _CONFUSION:
        yield _confusion(report.numbers)
    if len(rows) > _ROWS:
        yield f"{len(rows) - _ROWS:,} more rows are in the page; see report.save(path)."
    yield from map(on_one_line, tables.notes(report.numbers))


def _confusion(numbers: ClassMetrics) -> Table:
    names = [on_one_line(name) for name in numbers.classes]
    table = _table(["class", *(f"predicted {name}" for name in names)])
    for name, row in zip(names, numbers.confusion, strict=True):
        table.add_row(name, *(f"{count:,}" for count in row))
    return table


def _table(header: Sequence[str]) -> Table:
    table = Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    return table
