"""The user's table, in which each row is an example: a file or a data frame, and its columns."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctde_jax.bundle import Recipe, Row, are_numbers, is_missing, recipe
from ctde_jax.data import columns, kinds
from ctde_jax.data.classes import Use, note_on_numbers
from ctde_jax.data.columns import MANY_LINES, Column
from ctde_jax.data.dataset import Dataset, assemble, note_on_test_split, split_rows, standardized
from ctde_jax.data.files import faulty
from ctde_jax.data.frames import read_frame, read_parquet
from ctde_jax.data.header import doubt, is_header
from ctde_jax.data.labels import read_labels
from ctde_jax.data.rows import read_csv
from ctde_jax.devices import memory
from ctde_jax.errors import InputError, check_known, quoted

_NAMED = 3
"""Maximum number of columns that a sentence names."""


class _Table(NamedTuple):
    path: Path | str  # of the file, or a description of the data frame
    names: list[str]  # of all columns; empty without a line of names
    label: int
    features: list[int]
    rows: list[Row]
    notes: list[str]
    weights: np.ndarray | None = None  # float64[rows]

    def column(self, place: int) -> Column:
        cells = [row.cells[place] for row in self.rows]
        return Column(self.called(place), [row.line for row in self.rows], cells)

    def called(self, place: int) -> str:
        """Returns the quoted name of the column, or its number if it has no name."""
        return quoted(self.names[place]) if self.names and self.names[place] else str(place + 1)


def from_table(
    source: Path | str | Any,
    label: str | None = None,
    *,
    drop: Sequence[str] | str = (),
    categorical: Sequence[str] | str = (),
    weights: str | None = None,
    task: Use = "auto",
    like: Dataset | None = None,
) -> Dataset:
    r"""Loads a table with one column of labels.

    A column contains numbers, booleans, dates in ISO 8601 or categories, whatever most of its cells
    are, and any of them may be missing. A table of numbers without gaps is stored as it is, and
    standardized. Any other table is converted by a `Recipe`, which is fit on the training split:
    numbers and dates are standardized in float64, and gaps filled with the median and marked by
    another input; categories are one-hot, with one place for all others. `Dataset.recipe` and
    bundles contain it, so a node reads raw rows.

    Labels may be text or integers; the sorted distinct labels are the classes. The first line of a
    csv file is a header if it has words above numbers, or words that do not occur again in their
    columns, or `label`, or if it holds column numbers: 0, 1, 2, ... as pandas writes them, or
    distinct integers that are improbable as an example of this table. In doubtful cases, a note is
    added.

    Unnamed columns at the left, such as the index that `DataFrame.to_csv` writes, and named columns
    that number the lines are not used as features. The notes of the data set list them. They also
    list columns that look like identifiers, determine the label, are constant, or contain distinct
    numbers that are equal in float32.

    Args:
        source: Path of a csv file in UTF-8 with points in numbers, or of a parquet file; or a data
            frame of pandas, polars or another library that `narwhals` supports; or a
            `sklearn.utils.Bunch`.
        label: Name of the column of labels; by default the last column.
        drop: Names of columns that are not used.
        categorical: Names of columns whose cells are categories, also if they are numbers.
        weights: Name of the column of sample weights, which is not a feature; see `weighted`.
        task: `classification` uses any labels as classes, `regression` numbers as targets; `auto`
            is classification, but refuses labels that look like measurements.
        like: Data set of another table, whose conversion and classes are used. A model that was
            trained on it then receives the same inputs for the same row, as fine-tuning requires.
            `drop` and `categorical` must not be given.

    Raises:
        InputError: If the source is not a table, a name is not that of a column, a cell is not of
            the kind of its column, all cells of a column are missing, float32 does not distinguish
            the numbers of a feature, there are fewer than two classes, the labels look like
            measurements, dates or names, or a weight is not a number of at least 0.

    Examples:
        >>> rows = "31,nurse,yes,0\n,clerk,no,1\n50,nurse,no,1\n" * 9
        >>> with open("people.csv", "w") as file:
        ...     size = file.write("age,job,member,paid\n" + rows)
        >>> data = ctde.data.from_table("people.csv", label="paid")
        >>> data.columns[:2], data.classes
        (('age', 'age is missing'), ('0', '1'))
    """
    check_known("task", task, ("auto", "classification", "regression"))

    # A string is one name, not a sequence of characters.
    drop, categorical = (
        (names,) if isinstance(names, str) else names for names in (drop, categorical)
    )

    # Another table's conversion determines its columns.
    if like is not None:
        chosen = "drop" if drop else "categorical" if categorical else None
        if chosen is not None:
            raise InputError(chosen, "must not be set with like, which determines the columns.")
        if label is None and like.recipe is not None:
            label = like.recipe.label

    # Read the table, and number its classes, if it has any.
    table = _without(_read(source, label), drop, categorical, weights)
    column = table.column(table.label)
    classes, labels = read_labels(table.path, column, task)
    if like is not None:
        return _converted_like(like, table, classes, labels)
    if task == "auto" and are_numbers(classes):
        table.notes.extend(note_on_numbers(len(classes), f"the column {column.name}"))

    # Numbers without gaps need no recipe, so that nodes read arrays of them, too.
    cells = {place: table.column(place) for place in table.features}
    found: dict[int, recipe.Kind] = {
        place: kinds.infer(
            table.path, column, bool(table.names) and table.names[place] in categorical
        )
        for place, column in cells.items()
    }
    if not found:
        raise _without_features(table)
    is_plain = {*found.values()} == {"number"} and not any(
        is_missing(cell) for column in cells.values() for cell in column.cells
    )
    convert = _plain if is_plain else _by_recipe
    return convert(table, cells, found, classes, labels)


def _plain(
    table: _Table,
    cells: dict[int, Column],
    found: dict[int, recipe.Kind],
    classes: tuple[str, ...],
    labels: np.ndarray,
) -> Dataset:
    """Makes the data set of a table of numbers without gaps."""
    # Collect the features as float64.
    features = []
    notes = list(table.notes)
    coarse: dict[str, float] = {}
    for place, column in cells.items():
        values = kinds.numbers(table.path, column)
        if _is_used(table, column, values, labels, notes):
            error = columns.check_precision(table.path, column, values)
            if error is not None:
                coarse[column.name] = error
            features.append((place, values))
    if not features:
        raise _without_features(table)

    # One note for all columns in which distinct numbers are equal in float32, the worst first.
    if coarse:
        worst = sorted(coarse, key=coarse.__getitem__, reverse=True)
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        notes.append(
            "Distinct numbers become equal in float32 in the column "
            f"{', '.join(worst[:_NAMED])}{more}; the rounding error is at most "
            f"{coarse[worst[0]]:.0e} of the standard deviation."
        )

    # Standardize the features; their names are kept if all of them have one.
    inputs = np.stack([values for _, values in features], axis=1).astype(np.float32)
    dataset = standardized(
        assemble(inputs, labels, None, None, _stem(table), classes or None, table.weights)
    )
    names = [table.names[place] for place, _ in features] if table.names else []
    return replace(
        dataset, notes=(*notes, *dataset.notes), columns=tuple(names) if all(names) else ()
    )


def _by_recipe(
    table: _Table,
    cells: dict[int, Column],
    found: dict[int, recipe.Kind],
    classes: tuple[str, ...],
    labels: np.ndarray,
) -> Dataset:
    """Makes the data set of a table whose cells are converted by a recipe."""
    if not table.names or not all(table.names[place] for place in (*cells, table.label)):
        raise faulty(
            table.path,
            "has columns without names, although some contain words, dates or gaps",
            "add a line with the names of all columns",
        )

    # Fit the recipe on the training split.
    train, test = split_rows(len(labels))
    notes = list(table.notes)
    fitted = []
    for place, column in cells.items():
        is_complete = found[place] == "number" and not any(map(is_missing, column.cells))
        if is_complete and not _is_used(
            table, column, kinds.numbers(table.path, column), labels, notes
        ):
            continue
        fitted.append(kinds.fit(table.path, table.names[place], found[place], column, train))
    if not fitted:
        raise _without_features(table)
    conversion = Recipe(table.names[table.label], tuple(fitted))

    # Every category is an input, so a column of many words may exceed the memory.
    memory.check(
        "data_file",
        f"{len(conversion.features):,} inputs of each example of {table.path}",
        4 * len(labels) * len(conversion.features),
        "drop the columns with the most categories",
    )
    by_name = {table.names[place]: column.cells for place, column in cells.items()}
    inputs = conversion.encode(by_name)
    dataset = assemble(
        inputs[train],
        labels[train],
        inputs[test],
        labels[test],
        _stem(table),
        classes or None,
        None if table.weights is None else table.weights[train],
    )
    notes.append(note_on_test_split(len(test), len(labels)))
    return replace(
        dataset,
        notes=(*notes, *dataset.notes),
        columns=conversion.features,
        recipe=conversion,
    )


def _converted_like(
    like: Dataset, table: _Table, classes: tuple[str, ...], labels: np.ndarray
) -> Dataset:
    """Makes the data set of a table with the conversion, the scaling and the classes of another."""
    names = [each.name for each in like.recipe.columns] if like.recipe else [*like.columns]
    if not names:
        raise InputError("like", "must be a data set that from_table has made of named columns.")
    for name in names:
        check_known("like", name, table.names)
    cells = {name: table.column(table.names.index(name)) for name in names}

    # A class that the other table lacks has no output of the model.
    if bool(classes) != bool(like.classes):
        raise InputError("like", "must have the same task: classes, or targets in both tables.")
    for name in classes:
        check_known("like", name, like.classes)
    if classes:
        labels = np.array([like.classes.index(name) for name in classes], np.int32)[labels]

    # Convert by the recipe, or store the numbers, which are scaled like those of the other table.
    try:
        inputs = (
            like.recipe.encode({name: column.cells for name, column in cells.items()})
            if like.recipe
            else np.stack([kinds.numbers(table.path, each) for each in cells.values()], axis=1)
        )
    except recipe.Unreadable as error:
        raise kinds.unreadable(table.path, cells[error.column], error) from error
    dataset = assemble(
        inputs.astype(np.float32),
        labels,
        None,
        None,
        _stem(table),
        like.classes or None,
        table.weights,
    )
    return replace(
        dataset,
        notes=(*table.notes, *dataset.notes),
        columns=like.columns,
        recipe=like.recipe,
        shift=like.shift,
        scale=like.scale,
    )


def _is_used(
    table: _Table, column: Column, values: np.ndarray, labels: np.ndarray, notes: list[str]
) -> bool:
    """Returns whether a column of numbers is a feature, and appends the notes on it.

    Columns that number the lines are left out, if they have names.
    """
    if table.names and len(table.features) > 1 and columns.counts_lines(values):
        notes.append(f"The column {column.name} numbers the lines and is not used.")
        return False
    notes += _notes_on(column, values, labels)
    return True


def _stem(table: _Table) -> str:
    return table.path.stem if isinstance(table.path, Path) else "table"


def _without_features(table: _Table) -> InputError:
    return faulty(
        table.path, "has no column of features", "add a column of numbers that predict the label"
    )


def _notes_on(column: Column, values: np.ndarray, labels: np.ndarray) -> list[str]:
    # At most one sentence per column, on its worst fault.
    if len(values) >= MANY_LINES and len(np.unique(values)) == 1:
        return [
            f"The column {column.name} is {quoted(column.cells[0])} in every line, so it has no "
            "effect."
        ]
    if labels.dtype == np.int32 and columns.names_the_label(values, labels):
        return [
            f"The column {column.name} has one distinct number per class, so it determines the "
            "label; remove it unless it is known before the label."
        ]
    if columns.counts_lines(values) or columns.is_identifier(column.name.strip("'\""), values):
        return [
            f"The column {column.name} has a different integer in every line and is used as a "
            "feature; remove it if it only identifies the lines."
        ]
    return []


def _without(
    table: _Table, drop: Sequence[str], categorical: Sequence[str], weights: str | None
) -> _Table:
    """Removes the dropped columns and that of weights from the features.

    All names are checked, and `weights` of the table are set if there is a column of them.
    """
    weighted = () if weights is None else (weights,)
    for option, names in {"drop": drop, "categorical": categorical, "weights": weighted}.items():
        for name in names:
            if not table.names:
                raise InputError(
                    option,
                    f"must be names of columns, got {quoted(name)}, but {table.path} has no header "
                    "line; add one.",
                )
            check_known(option, name, table.names)
            if name == table.names[table.label]:
                raise InputError(
                    option, f"must not contain the label {quoted(name)}; pass another column."
                )
    unused = (*drop, *weighted)
    return table._replace(
        features=[
            place for place in table.features if not table.names or table.names[place] not in unused
        ],
        weights=None if weights is None else _weights(table, weights),
    )


def _weights(table: _Table, name: str) -> np.ndarray:
    """Returns the weights in the column `name`, `float64[rows]`."""
    column = table.column(table.names.index(name))
    weights = columns.numbers(table.path, column)
    place = int(weights.argmin())
    if weights[place] < 0:
        raise faulty(
            table.path,
            f"has {quoted(column.cells[place])} in line {column.lines[place]}, column "
            f"{column.name}, which is a negative weight",
            "weights must be at least 0",
        )
    return weights


def _read(source: Any, label: str | None) -> _Table:
    # A data frame, or a file whose columns have names.
    if not isinstance(source, str | Path):
        return _named("the table", *read_frame(source), label)
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() == ".parquet":
        return _named(path, *read_parquet(path), label)

    # A csv file may have no line of names.
    rows = read_csv(path)
    first = rows[0].cells
    width = len(first)
    place = first.index(label) if label in first else width - 1

    # Without a header line, the labels are in the last column.
    if not (label in first or is_header(rows, place)):
        if label is not None:
            raise InputError(
                "label",
                f"must be the name of a column, got {label!r}, but {path} has no header line; add "
                "one, or move the labels to the last column and omit this option.",
            )
        notes = [f"There is no header line; the labels are in the last column, {place + 1}."]
        notes += doubt(rows, place)
        return _Table(path, [], place, list(range(width - 1)), rows, notes)

    # With a header line, the label may be in any column, and all others are features.
    table = _named(path, first, rows[1:], label)
    _check_header(table, rows[0])
    table.notes.append(
        f"Line {rows[0].line} contains the column names; the labels are in the column "
        f"{table.called(place)}."
    )

    # Leave out columns at the left without names.
    unnamed = len(list(takewhile(_is_unnamed, first)))
    if unnamed:
        which = (
            "The first column has no name"
            if unnamed == 1
            else f"The first {unnamed} columns have no names"
        )
        table.notes.append(
            f"{which}, like the index that pandas writes, and {'is' if unnamed == 1 else 'are'} "
            "not used."
        )
    return table._replace(features=[place for place in table.features if place >= unnamed])


def _named(path: Path | str, names: list[str], rows: list[Row], label: str | None) -> _Table:
    """Returns a table whose columns have names; by default, the label is the last column."""
    if label is not None:
        check_known("label", label, names)
    place = len(names) - 1 if label is None else names.index(label)
    return _Table(path, names, place, [i for i in range(len(names)) if i != place], rows, [])


def _is_unnamed(name: str) -> bool:
    """Returns whether a column has no name, or one that pandas generates for a missing name."""
    return re.fullmatch(r"(Unnamed: \d+(\.\d+)?)?", name) is not None


def _check_header(table: _Table, header: Row) -> None:
    if not table.rows:
        raise faulty(table.path, "has a header line but no examples", "add one line per example")
    twice = [name for name, count in Counter(header.cells).items() if name and count > 1]
    if twice:
        raise faulty(
            table.path,
            f"has several columns named {quoted(twice[0])}",
            "give each a different name",
        )
    # Concatenated files repeat the header line.
    for row in table.rows:
        if row.cells == header.cells:
            raise faulty(
                table.path, f"repeats the column names in line {row.line}", "remove this line"
            )
