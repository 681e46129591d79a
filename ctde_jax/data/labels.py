"""Labels of a table: classes, or the targets of regression."""

from pathlib import Path

import numpy as np

from ctde_jax.bundle import are_numbers, is_missing, number_of
from ctde_jax.data import columns
from ctde_jax.data.classes import (
    CLASSIFY,
    FEW_CLASSES,
    REGRESS,
    Use,
    from_words,
    may_be_measurements,
)
from ctde_jax.data.columns import Column
from ctde_jax.data.files import faulty
from ctde_jax.errors import quoted

_PASS_LABELS = "pass the column that contains the classes as label (--label-column)"


def read_labels(path: Path | str, column: Column, task: Use) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the classes and their indices, `int32[lines]`, or no classes and `float64[lines]`."""
    if task != "regression":
        return _classes(path, column, task)
    words = [cell for cell in column.cells if number_of(cell) is None and not is_missing(cell)]
    if 2 * len(words) > len(column.cells):
        raise faulty(
            path,
            f"has labels such as {quoted(words[0])} in column {column.name}, which are not numbers",
            f"{CLASSIFY}, or the column of the targets as label (--label-column)",
        )
    values = columns.numbers(path, column)
    columns.check_precision(path, column, values)
    return (), values


def _classes(path: Path | str, column: Column, task: Use) -> tuple[tuple[str, ...], np.ndarray]:
    cells = column.cells

    # Every line needs a label.
    if "" in cells:
        line = column.lines[cells.index("")]
        raise faulty(
            path,
            f"has an empty label in line {line}, column {column.name}",
            "fill in the cell, or remove the line",
        )

    # Numbers are classes only if they are whole and repeat, unless the task is given.
    if task == "auto" and are_numbers(cells):
        values = [number_of(cell) or 0.0 for cell in cells]
        if not all(value.is_integer() for value in values):
            raise faulty(
                path,
                f"has labels such as {quoted(cells[0])} in column {column.name}, which are "
                "measurements, not classes",
                f"{REGRESS}, or {_PASS_LABELS}",
            )
        if may_be_measurements(values):
            raise faulty(
                path,
                f"has labels such as {quoted(cells[0])} in column {column.name}, "
                f"{len(set(values)):,} distinct integers in {len(cells):,} lines, which look like "
                "measurements, not classes",
                f"{REGRESS}, {CLASSIFY} if they are classes, or {_PASS_LABELS}",
            )

    # Words are classes only if they repeat, and there must be two classes.
    classes, labels = from_words(cells)
    if len(classes) > FEW_CLASSES and len(cells) < 2 * len(classes) and not are_numbers(classes):
        raise faulty(
            path,
            f"has labels such as {quoted(cells[0])} in column {column.name}, {len(classes):,} "
            f"distinct ones in {len(cells):,} lines, which look like dates or names, not classes",
            f"{_PASS_LABELS}, or group the labels into fewer classes",
        )
    if len(classes) < 2:
        raise faulty(
            path,
            f"has only the label {quoted(cells[0])} in column {column.name}",
            "provide at least two classes",
        )
    return classes, labels
