"""The user's table: a CSV file in which each line is an example, and the use of its columns."""

import csv
import io
import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctde_jax.bundle import are_numbers, number_of
from ctde_jax.data import columns
from ctde_jax.data.classes import (
    FEW_CLASSES,
    Use,
    from_words,
    may_be_measurements,
    note_on_numbers,
)
from ctde_jax.data.columns import MANY_LINES, Column, is_missing
from ctde_jax.data.dataset import Dataset, assemble, standardized
from ctde_jax.data.files import check_size, faulty, not_utf8, opened
from ctde_jax.errors import InputError, check_known, quoted

_NAMED = 3
"""Maximum number of columns that a sentence names."""

_PASS_LABELS = "pass the column that contains the classes as label_column (--label-column)"
_REGRESS = "pass --task regression to predict them"

_CHANCE = 1e-3
"""The first line is a header if the probability of such an example is at most this."""

_JUDGED = 2000
"""Maximum number of lines that the first line is compared with."""

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class _Row(NamedTuple):
    line: int  # in the file, counted from 1
    cells: list[str]


class _Table(NamedTuple):
    names: list[str]  # of all columns; empty without a line of names
    label: int
    features: list[int]
    rows: list[_Row]
    notes: list[str]

    def column(self, place: int) -> Column:
        cells = [row.cells[place] for row in self.rows]
        return Column(self.called(place), [row.line for row in self.rows], cells)

    def called(self, place: int) -> str:
        """Returns the quoted name of the column, or its number if it has no name."""
        return quoted(self.names[place]) if self.names and self.names[place] else str(place + 1)


def from_csv(path: Path | str, label_column: str | None = None, task: Use = "auto") -> Dataset:
    """Loads a table of numbers with one column of labels, and standardizes the features.

    Labels may be text or integers; the sorted distinct labels are the classes. The first line is a
    header if one of its feature cells is text, if one is `label_column`, or if it holds column
    numbers: 0, 1, 2, ... as pandas writes them, or distinct integers that are improbable as an
    example of this table. In doubtful cases, a note is added.

    Unnamed columns at the left, such as the index that `DataFrame.to_csv` writes, and named columns
    that number the lines are not used as features. The notes of the data set list them. They also
    list columns that look like identifiers, determine the label, are constant, or contain distinct
    numbers that are equal in float32.

    Args:
        path: CSV file in UTF-8, with commas between cells and points in numbers.
        label_column: Name of the column of labels; by default the last column.
        task: `classification` uses any labels as classes, `regression` numbers as targets; `auto`
            is classification, but refuses labels that look like measurements.

    Raises:
        InputError: If the file is not a table, `label_column` is not one of its columns, a feature
            is not a finite number, float32 does not distinguish the numbers of a feature, there are
            fewer than two classes, or the labels look like measurements, dates or names.

    Examples:
        >>> points = np.random.default_rng(0).normal(size=(50, 2))
        >>> table = np.column_stack([points, points[:, 0] < 0])
        >>> np.savetxt("points.csv", table, "%g", ",", header="x,y,side", comments="")
        >>> data = ctde.data.from_csv("points.csv", label_column="side")
        >>> data.columns, data.classes
        (('x', 'y'), ('0', '1'))
    """
    # Read the table, and number its classes, if it has any.
    path = Path(os.path.expanduser(path))
    table = _table(path, label_column)
    label = table.column(table.label)
    classes, labels = _labels(path, label, task)
    features = []
    notes = list(table.notes)
    if task == "auto" and are_numbers(classes):
        notes += note_on_numbers(len(classes), f"the column {label.name}")

    # Collect the features as float64; columns that number the lines are left out.
    coarse: dict[str, float] = {}
    for place in table.features:
        column = table.column(place)
        values = columns.numbers(path, column)
        if table.names and len(table.features) > 1 and columns.counts_lines(values):
            notes.append(f"The column {column.name} numbers the lines and is not used.")
            continue
        error = columns.check_precision(path, column, values)
        if error is not None:
            coarse[column.name] = error
        notes += _notes_on(column, values, labels)
        features.append((place, values))
    if not features:
        raise faulty(
            path, "has no column of features", "add a column of numbers that predict the label"
        )

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
    dataset = standardized(assemble(inputs, labels, None, None, path.stem, classes or None))
    names = [table.names[place] for place, _ in features] if table.names else []
    return replace(
        dataset, notes=(*notes, *dataset.notes), columns=tuple(names) if all(names) else ()
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


def _table(path: Path, label_column: str | None) -> _Table:
    rows = _rows(path)
    first = rows[0].cells
    width = len(rows[0].cells)
    label = first.index(label_column) if label_column in first else width - 1

    # Without a header line, the labels are in the last column.
    if not (label_column in first or _is_header(rows, label)):
        if label_column is not None:
            raise InputError(
                "label_column",
                f"must be the name of a column, got {label_column!r}, but {path} has no header "
                "line; add one, or move the labels to the last column and omit this option.",
            )
        notes = [f"There is no header line; the labels are in the last column, {label + 1}."]
        return _Table([], label, list(range(width - 1)), rows, [*notes, *_doubt(rows, label)])

    # With a header line, the label may be in any column, and all others are features.
    if label_column is not None:
        check_known("label_column", label_column, first)
    table = _Table(first, label, [place for place in range(width) if place != label], rows[1:], [])
    _check_header(path, table, rows[0])
    table.notes.append(
        f"Line {rows[0].line} contains the column names; the labels are in the column "
        f"{table.called(label)}."
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


def _is_unnamed(name: str) -> bool:
    """Returns whether a column has no name, or one that pandas generates for a missing name."""
    return re.fullmatch(r"(Unnamed: \d+(\.\d+)?)?", name) is not None


def _check_header(path: Path, table: _Table, header: _Row) -> None:
    if not table.rows:
        raise faulty(path, "has a header line but no examples", "add one line per example")
    twice = [name for name, count in Counter(header.cells).items() if name and count > 1]
    if twice:
        raise faulty(
            path, f"has several columns named {quoted(twice[0])}", "give each a different name"
        )
    # Concatenated files repeat the header line.
    for row in table.rows:
        if row.cells == header.cells:
            raise faulty(path, f"repeats the column names in line {row.line}", "remove this line")


def _is_header(rows: list[_Row], label: int) -> bool:
    """Returns whether the first line holds column names rather than an example."""
    first = rows[0].cells
    others = [row.cells for row in rows[1:]]

    # Features are numbers, so a word is a name.
    features = [cell for place, cell in enumerate(first) if place != label]
    if any(number_of(cell) is None and not is_missing(cell) for cell in features):
        return True
    if not others:
        return False

    # Names that pandas generates: numbers from 0, including the label; the name of an index, which
    # comes first, is empty.
    has_index = first[0] == "" and label != 0
    names = features[has_index:]
    places = [place for place in range(len(first)) if place != label][has_index:]
    is_whole = all(re.fullmatch(r"\d+", name) for name in names)
    is_above_decimals = is_whole and not any(
        re.fullmatch(r"[-+]?\d+", cells[i]) for cells in others for i in places
    )
    if [*names, first[label]] == _counted(len(names) + 1) and (
        has_index or len(names) > 2 or is_above_decimals
    ):
        return True

    # Feature cells that are improbable for an example.
    if _chance(rows, label) <= _CHANCE:
        return True

    # A label that other lines have, too, is not a name.
    labels = Counter(cells[label] for cells in others)
    if first[label] in labels:
        return False

    # Names that are 0, 1, 2, ... or integers above decimals, or a label that is text above numbers.
    if names == _counted(len(names)) or is_above_decimals:
        return True
    if (
        number_of(first[label]) is None
        and not is_missing(first[label])
        and are_numbers(list(labels))
    ):
        return True

    # Increasing whole numbers, such as years, if no other line has a unique label.
    is_increasing = is_whole and _increases(names)
    return is_increasing and len(names) > 2 and min(labels.values()) > 1


def _are_column_numbers(names: list[str]) -> bool:
    """Returns whether these are distinct integers from 0 to 9999, such as column numbers."""
    return len({*names}) == len(names) and all(
        re.fullmatch(r"0|[1-9]\d{0,3}", name) for name in names
    )


def _increases(names: list[str]) -> bool:
    return sorted({int(name) for name in names}) == [int(name) for name in names]


def _chance(rows: list[_Row], label: int) -> float:
    """Estimates the probability of an example like the first line, given the other lines.

    It is low if the first line probably holds column numbers. The evidence is: integers above
    columns of decimals, integers far outside the columns of integers, a label that no other line
    has, and all numbers from 0 in some order. The probability is the product of the fractions of
    the other lines that have each property. If another line has the label, or it is a number that
    is not far outside its column, only the decimals are evidence, because the largest example of a
    table may come first.

    Returns:
        The probability; 1 if the first line holds no column numbers, or there are fewer than
        `MANY_LINES` other lines.
    """
    # Column numbers are different whole numbers; fewer than `MANY_LINES` lines are no evidence.
    first = rows[0].cells
    others = [row.cells for row in rows[1 : _JUDGED + 1]]
    places = [place for place in range(len(first)) if place != label]
    names = [first[place] for place in places]
    if len(others) < MANY_LINES or not _are_column_numbers(names) or first[label] in names:
        return 1.0

    # Fraction of integers in each column. If another line has integers only, the first may be
    # rounded, too, so integers above decimals are no evidence.
    whole = [
        [re.fullmatch(r"[-+]?\d+", cells[place]) is not None for place in places]
        for cells in others
    ]
    shares = [(sum(column) + 1) / (len(others) + 1) for column in zip(*whole, strict=True)]
    is_rounded = not all(map(all, zip(*whole, strict=True))) and any(map(all, whole))
    chance = 1.0 if is_rounded else math.prod(shares)

    # If the label is not new, only decimals are evidence.
    labels = Counter(row.cells[label] for row in rows[1:])
    if first[label] in labels or _may_follow(first[label], list(labels)):
        return chance

    # A new label, and integers far outside their columns; counts plus 1, so that no fraction is 0.
    single = sum(count == 1 for count in labels.values())
    chance *= (single + 1) / len(rows)
    for place, share in zip(places, shares, strict=True):
        if share == 1 and _is_far_outside(
            int(first[place]), {int(cells[place]) for cells in others}
        ):
            chance *= 2 / (len(others) + 1)

    # All numbers from 0 in some order.
    ordered = sorted(_counted(len(first)))
    is_permuted = len(first) > 4 and sorted(first) == ordered
    return 0.0 if is_permuted and not any(sorted(cells) == ordered for cells in others) else chance


def _may_follow(label: str, others: list[str]) -> bool:
    """Returns whether a numeric label may continue the others, as the largest in a sorted table."""
    if not are_numbers([label, *others]):
        return False
    whole = [number_of(other) or 0.0 for other in others]
    # Among decimals, any number may follow.
    return not all(map(float.is_integer, whole)) or not _is_far_outside(
        int(float(label)), {int(each) for each in whole}
    )


def _is_far_outside(number: int, others: set[int]) -> bool:
    """Returns whether `number` is outside the range of `others` by over twice their largest gap."""
    ordered = sorted(others)
    largest_gap = max((after - before for before, after in pairwise(ordered)), default=1)
    return max(ordered[0] - number, number - ordered[-1]) > 2 * largest_gap


def _doubt(rows: list[_Row], label: int) -> list[str]:
    """Returns a note if the first line, used as an example, may hold column numbers; else []."""
    first = rows[0].cells
    others = [row.cells for row in rows[1:]]
    names = [cell for place, cell in enumerate(first) if place != label]
    if not others or not _are_column_numbers(names):
        return []
    way_out = (
        "if it contains the column names, pass the name of the label column, or add a letter to "
        "each name"
    )
    if all(cells[label] != first[label] for cells in others):
        return [
            "Line 1 is used as an example, although no other line has its label, "
            f"{quoted(first[label])}, and its other cells are distinct integers; {way_out}."
        ]
    is_permuted = len(first) > 4 and sorted(first) == sorted(_counted(len(first)))
    if len(names) > 2 and (_increases(names) or is_permuted):
        which = "all numbers from 0" if is_permuted else "increasing integers"
        return [f"Line 1 is used as an example, although its cells are {which}; {way_out}."]
    return []


def _counted(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _rows(path: Path) -> list[_Row]:
    rows = []
    line = 1
    # `utf-8-sig` skips a byte order mark; `newline=""` leaves line breaks within quotes to csv.
    with (
        opened(path) as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file,
    ):
        check_size(content)
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                if cells:
                    rows.append(_Row(line, [cell.strip() for cell in cells]))
                line = reader.line_num + 1  # a quoted cell may span several lines
        except UnicodeDecodeError as error:
            content.seek(0)
            raise not_utf8(
                path, content.read(8), f"has the byte 0x{error.object[error.start]:02x}"
            ) from error
        except csv.Error as error:
            raise faulty(
                path, f"is not valid CSV in line {line} ({error})", "correct this line"
            ) from error
    if not rows:
        raise faulty(path, "is empty", "pass a file with one line per example")
    _check_shape(path, rows)
    return rows


def _check_shape(path: Path, rows: list[_Row]) -> None:
    """Raises InputError unless all lines have the same number of cells, separated by commas.

    There must be at least two columns, and the last one must not be empty.
    """
    width = len(rows[0].cells)
    wrong = next((row for row in rows if len(row.cells) != width), None)
    # A comment explains a different number of cells.
    if wrong is not None and (
        comment := next((row for row in rows[:2] if row.cells[0].startswith("#")), None)
    ):
        raise faulty(path, f"has a comment in line {comment.line}", "remove the line")
    # A different separator: the first two lines have it, and commas do not make columns of numbers.
    for separator, name in _SEPARATORS.items():
        parts = [",".join(row.cells).split(separator) for row in rows[:2]]
        has_decimal_commas = all(
            number_of(first.replace(",", ".")) is not None for first, *_ in parts
        )
        if min(map(len, parts)) > 1 and (width < 2 or wrong is not None or has_decimal_commas):
            fault = f"has cells separated by {name}"
            raise faulty(path, fault, "save it with commas between cells and decimal points")
    # Any other line with a different number of cells.
    if wrong is not None:
        raise faulty(
            path,
            f"has {len(wrong.cells)} cells in line {wrong.line} and {width} in line {rows[0].line}",
            "give every line the same number of cells, and write numbers without commas",
        )
    if width < 2:
        raise faulty(path, "has a single column", "separate the features and the label by commas")
    if not any(row.cells[-1] for row in rows):
        raise faulty(path, "has an empty last column", "remove the comma at the end of each line")


def _labels(path: Path, column: Column, task: Use) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the classes and their indices, `int32[lines]`, or no classes and `float64[lines]`."""
    if task != "regression":
        return _classes(path, column, task)
    words = [cell for cell in column.cells if number_of(cell) is None and not is_missing(cell)]
    if 2 * len(words) > len(column.cells):
        raise faulty(
            path,
            f"has labels such as {quoted(words[0])} in column {column.name}, which are not numbers",
            "pass --task classification, or the column of the targets as label_column "
            "(--label-column)",
        )
    values = columns.numbers(path, column)
    columns.check_precision(path, column, values)
    return (), values


def _classes(path: Path, column: Column, task: Use) -> tuple[tuple[str, ...], np.ndarray]:
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
                f"{_REGRESS}, or {_PASS_LABELS}",
            )
        if may_be_measurements(values):
            raise faulty(
                path,
                f"has labels such as {quoted(cells[0])} in column {column.name}, "
                f"{len(set(values)):,} distinct integers in {len(cells):,} lines, which look like "
                "measurements, not classes",
                f"{_REGRESS}, --task classification if they are classes, or {_PASS_LABELS}",
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
