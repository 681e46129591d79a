"""The user's own table: a CSV file in which each line is an example, and what is decided about its columns."""

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
from ctde_jax.data.classes import FEW_CLASSES, from_words, look_measured, note_on_numbers
from ctde_jax.data.columns import MANY_LINES, Column, is_missing
from ctde_jax.data.dataset import Dataset, assemble, standardized
from ctde_jax.data.files import check_size, faulty, not_utf8, opened
from ctde_jax.errors import InputError, check_known, quoted

_NAMED = 3
"""Columns that a sentence names at most."""

_NAME_LABELS = "name the column that holds the classes in label_column (--label-column)"

_CHANCE = 1e-3
"""A line that is at most as probable as this to be an example, judged by the other lines, holds column names."""

_JUDGED = 2000
"""Lines by which the first one is judged, at most."""

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
        """Returns the column's name as a sentence has it, or its number."""
        return quoted(self.names[place]) if self.names and self.names[place] else str(place + 1)


def from_csv(path: Path | str, label_column: str | None = None) -> Dataset:
    """Loads a table of numbers with one column of labels, and standardizes the features.

    Labels may be words or numbers; sorted, they are the classes. The first line holds the column names if one of its
    feature cells is a word, if one is `label_column`, or if the line only makes sense as names: numbers counted from 0
    as pandas writes them, or different whole numbers unlike the numbers below them. A note names a doubt.

    Left out of the features are unnamed columns at the left, the index that `DataFrame.to_csv` writes, and named
    columns that number the lines. The data set's notes say so, and name columns that look like identifiers, repeat the
    label, have one value, or have numbers that float32 merges.

    Args:
        path: A CSV file in UTF-8, with commas between cells and points in numbers.
        label_column: The name of the column that holds the labels; by default the last column.

    Raises:
        InputError: The file is no table, a feature is not a finite number, float32 does not tell a feature's numbers
            apart, there are not two classes, or the labels look like measurements.
    """
    path = Path(os.path.expanduser(path))
    table = _table(path, label_column)
    label = table.column(table.label)
    classes, labels = _classes(path, label)
    features, notes = [], list(table.notes)
    if are_numbers(classes):
        notes += note_on_numbers(len(classes), f"the column {label.name}")
    coarse: dict[str, float] = {}
    for place in table.features:
        column = table.column(place)
        values = columns.numbers(path, column)
        if table.names and len(table.features) > 1 and columns.counts_lines(values):
            notes.append(f"The column {column.name} numbers the lines, and was left out.")
            continue
        error = columns.check_precision(path, column, values)
        if error is not None:
            coarse[column.name] = error
        notes += _notes_on(column, values, labels)
        features.append((place, values))
    if not features:
        raise faulty(
            path, "has no column of features", "add a column of numbers that the label depends on"
        )
    if coarse:
        worst = sorted(coarse, key=coarse.__getitem__, reverse=True)
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        notes.append(
            f"Some different numbers become the same in float32 in the column {', '.join(worst[:_NAMED])}{more}, by "
            f"rounding of at most {coarse[worst[0]]:.0e} of the standard deviation."
        )
    inputs = np.stack([values for _, values in features], axis=1).astype(np.float32)
    dataset = standardized(assemble(inputs, labels, None, None, path.stem, classes))
    names = [table.names[place] for place, _ in features] if table.names else []
    return replace(
        dataset, notes=(*notes, *dataset.notes), columns=tuple(names) if all(names) else ()
    )


def _notes_on(column: Column, values: np.ndarray, labels: np.ndarray) -> list[str]:
    if len(values) >= MANY_LINES and len(np.unique(values)) == 1:
        return [
            f"The column {column.name} is {quoted(column.cells[0])} in every line, so it has no effect."
        ]
    if columns.names_the_label(values, labels):
        return [
            f"The column {column.name} has one number for each class, so it gives the label away: remove it unless it "
            "is known before the label is."
        ]
    if columns.counts_lines(values) or columns.is_identifier(column.name.strip("'\""), values):
        return [
            f"The column {column.name} has another whole number in every line, and was kept: remove it if it only "
            "names the lines."
        ]
    return []


def _table(path: Path, label_column: str | None) -> _Table:
    rows = _rows(path)
    first, width = rows[0].cells, len(rows[0].cells)
    label = first.index(label_column) if label_column in first else width - 1
    if not (label_column in first or _is_header(rows, label)):
        if label_column is not None:
            raise InputError(
                "label_column",
                f"must name a column, got {label_column!r}, but {path} has no header line: add one, "
                "or put the labels into the last column and leave the option out.",
            )
        notes = [
            f"There is no line of column names; the labels are in the last column, {label + 1}."
        ]
        return _Table([], label, list(range(width - 1)), rows, [*notes, *_doubt(rows, label)])
    if label_column is not None:
        check_known("label_column", label_column, first)
    table = _Table(first, label, [place for place in range(width) if place != label], rows[1:], [])
    _check_header(path, table, rows[0])
    table.notes.append(
        f"Line {rows[0].line} holds the column names; the labels are in the column {table.called(label)}."
    )
    unnamed = len(list(takewhile(_is_unnamed, first)))
    if unnamed:
        which = (
            "The first column has no name"
            if unnamed == 1
            else f"The first {unnamed} columns have no names"
        )
        table.notes.append(
            f"{which}, like the index that pandas writes, and {'was' if unnamed == 1 else 'were'} left out."
        )
    return table._replace(features=[place for place in table.features if place >= unnamed])


def _is_unnamed(name: str) -> bool:
    """Returns whether pandas made up the name of a column that has none, or it has none."""
    return re.fullmatch(r"(Unnamed: \d+(\.\d+)?)?", name) is not None


def _check_header(path: Path, table: _Table, header: _Row) -> None:
    if not table.rows:
        raise faulty(path, "has a header line and no examples", "add one line for each example")
    twice = [name for name, count in Counter(header.cells).items() if name and count > 1]
    if twice:
        raise faulty(
            path, f"has several columns called {quoted(twice[0])}", "give each another name"
        )
    for row in table.rows:
        if row.cells == header.cells:
            raise faulty(path, f"repeats the column names in line {row.line}", "remove this line")


def _is_header(rows: list[_Row], label: int) -> bool:
    """Returns whether the first line holds column names and not an example."""
    first, others = rows[0].cells, [row.cells for row in rows[1:]]
    features = [cell for place, cell in enumerate(first) if place != label]
    if any(number_of(cell) is None and not is_missing(cell) for cell in features):
        return True
    if not others:
        return False
    # Names as pandas makes them up: numbers from 0, the label's too if it has no other name, after that of an index.
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
    if _chance(rows, label) <= _CHANCE:
        return True
    labels = Counter(cells[label] for cells in others)
    if first[label] in labels:
        return False
    if names == _counted(len(names)) or is_above_decimals:
        return True
    if (
        number_of(first[label]) is None
        and not is_missing(first[label])
        and are_numbers(list(labels))
    ):
        return True  # a word above numbers
    # Increasing whole numbers, such as years, above lines none of which is alone with its label.
    is_increasing = is_whole and _increases(names)
    return is_increasing and len(names) > 2 and min(labels.values()) > 1


def _are_column_numbers(names: list[str]) -> bool:
    """Returns whether these may be column numbers or years: different whole numbers of at most four digits."""
    return len({*names}) == len(names) and all(
        re.fullmatch(r"0|[1-9]\d{0,3}", name) for name in names
    )


def _increases(names: list[str]) -> bool:
    return sorted({int(name) for name in names}) == [int(name) for name in names]


def _chance(rows: list[_Row], label: int) -> float:
    """Estimates how probable an example like the first line is, from features that only column numbers explain.

    These are whole numbers above columns of decimals, numbers far outside the columns of whole numbers, a label that no
    other line has, and all numbers from 0 in some order. Each counts by its share of the other lines, as if they were
    independent. Without a new label, far outside its column if it is a number, only decimals count: the largest example
    of a table may come first.
    """
    first, others = rows[0].cells, [row.cells for row in rows[1 : _JUDGED + 1]]
    places = [place for place in range(len(first)) if place != label]
    names = [first[place] for place in places]
    if len(others) < MANY_LINES or not _are_column_numbers(names) or first[label] in names:
        return 1.0
    whole = [
        [re.fullmatch(r"[-+]?\d+", cells[place]) is not None for place in places]
        for cells in others
    ]
    shares = [(sum(column) + 1) / (len(others) + 1) for column in zip(*whole, strict=True)]
    # Rounding comes in whole lines, so that one of whole numbers alone says that there may be others.
    is_rounded = not all(map(all, zip(*whole, strict=True))) and any(map(all, whole))
    chance = 1.0 if is_rounded else math.prod(shares)
    labels = Counter(row.cells[label] for row in rows[1:])
    if first[label] in labels or _may_follow(first[label], list(labels)):
        return chance
    single = sum(count == 1 for count in labels.values())
    chance *= (single + 1) / len(rows)
    for place, share in zip(places, shares, strict=True):
        if share == 1 and _is_far_outside(
            int(first[place]), {int(cells[place]) for cells in others}
        ):
            chance *= 2 / (len(others) + 1)
    ordered = sorted(_counted(len(first)))
    is_permuted = len(first) > 4 and sorted(first) == ordered
    return 0.0 if is_permuted and not any(sorted(cells) == ordered for cells in others) else chance


def _may_follow(label: str, others: list[str]) -> bool:
    """Returns whether a numeric label may be one more of such numbers, as the largest one of a sorted table is."""
    if not are_numbers([label, *others]):
        return False
    whole = [number_of(other) or 0.0 for other in others]
    return not all(map(float.is_integer, whole)) or not _is_far_outside(
        int(float(label)), {int(each) for each in whole}
    )


def _is_far_outside(number: int, others: set[int]) -> bool:
    """Returns whether a number is twice as far from the nearest other one as any of these is from the next."""
    ordered = sorted(others)
    largest_gap = max((after - before for before, after in pairwise(ordered)), default=1)
    return max(ordered[0] - number, number - ordered[-1]) > 2 * largest_gap


def _doubt(rows: list[_Row], label: int) -> list[str]:
    """Returns a sentence on a first line that was taken as an example, and may hold column numbers."""
    first, others = rows[0].cells, [row.cells for row in rows[1:]]
    names = [cell for place, cell in enumerate(first) if place != label]
    if not others or not _are_column_numbers(names):
        return []
    way_out = "if it holds the column names, give the name of the label column, or put a letter into each name"
    if all(cells[label] != first[label] for cells in others):
        return [
            f"Line 1 was taken as an example, although no other line has its label, {quoted(first[label])}, and its "
            f"other cells are different whole numbers: {way_out}."
        ]
    is_permuted = len(first) > 4 and sorted(first) == sorted(_counted(len(first)))
    if len(names) > 2 and (_increases(names) or is_permuted):
        which = "all numbers from 0" if is_permuted else "increasing whole numbers"
        return [f"Line 1 was taken as an example, although its cells are {which}: {way_out}."]
    return []


def _counted(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _rows(path: Path) -> list[_Row]:
    rows, line = [], 1
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
                line = reader.line_num + 1  # a quoted cell may go on over several lines
        except UnicodeDecodeError as error:
            content.seek(0)
            raise not_utf8(
                path, content.read(8), f"has the byte 0x{error.object[error.start]:02x}"
            ) from error
        except csv.Error as error:
            raise faulty(
                path, f"is no CSV file at line {line} ({error})", "correct this line"
            ) from error
    if not rows:
        raise faulty(path, "is empty", "give a file with one line for each example")
    _check_shape(path, rows)
    return rows


def _check_shape(path: Path, rows: list[_Row]) -> None:
    """Raises InputError if lines have different numbers of cells, or the cells are not separated by commas."""
    width = len(rows[0].cells)
    wrong = next((row for row in rows if len(row.cells) != width), None)
    if wrong is not None and (
        comment := next((row for row in rows[:2] if row.cells[0].startswith("#")), None)
    ):
        raise faulty(path, f"has a comment in line {comment.line}", "remove the line")
    for separator, name in _SEPARATORS.items():
        parts = [",".join(row.cells).split(separator) for row in rows[:2]]
        has_decimal_commas = all(
            number_of(first.replace(",", ".")) is not None for first, *_ in parts
        )
        if min(map(len, parts)) > 1 and (width < 2 or wrong is not None or has_decimal_commas):
            fault = f"has its cells separated by {name}"
            raise faulty(path, fault, "save it with commas between cells, and points in numbers")
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


def _classes(path: Path, column: Column) -> tuple[tuple[str, ...], np.ndarray]:
    cells = column.cells
    if "" in cells:
        line = column.lines[cells.index("")]
        raise faulty(
            path,
            f"has an empty label in line {line}, column {column.name}",
            "fill in the cell, or remove the line",
        )
    if are_numbers(cells):
        values = [number_of(cell) or 0.0 for cell in cells]
        if not all(value.is_integer() for value in values):
            raise faulty(
                path,
                f"has labels such as {quoted(cells[0])} in column {column.name}, which are measurements and no classes",
                f"{_NAME_LABELS}, or learn measurements in Python, with data.from_arrays and a Task of your own",
            )
        if look_measured(values):
            raise faulty(
                path,
                f"has labels such as {quoted(cells[0])} in column {column.name}, {len(set(values)):,} different whole "
                f"numbers in {len(cells):,} lines, which look like measurements and not like classes",
                f"{_NAME_LABELS}, group the numbers into few classes, or learn measurements in Python, with "
                "data.from_arrays and a Task of your own",
            )
    classes, labels = from_words(cells)
    if len(classes) > FEW_CLASSES and len(cells) < 2 * len(classes) and not are_numbers(classes):
        raise faulty(
            path,
            f"has labels such as {quoted(cells[0])} in column {column.name}, {len(classes):,} different ones in "
            f"{len(cells):,} lines, which look like dates or names and not like classes",
            f"{_NAME_LABELS}, or group the labels into few classes",
        )
    if len(classes) < 2:
        raise faulty(
            path,
            f"has only the label {quoted(cells[0])} in column {column.name}",
            "give at least two classes",
        )
    return classes, labels
