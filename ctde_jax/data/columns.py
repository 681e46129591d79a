"""Columns of a table: conversion of their cells to numbers, and signs that they are no features."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctde_jax.bundle import is_missing, number_of
from ctde_jax.data.arrays import COARSE, NOISE
from ctde_jax.data.files import faulty
from ctde_jax.errors import quoted

_LARGEST = float(np.finfo(np.float32).max)
_MOST_DIGITS = 2**53
"""Integers above this one are not exact in float64."""

DATE_LIKE = r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}.*"
NUMBER_LIKE = r"[-+]?\d[\d.,'\s]*"
"""Patterns of cells that are probably dates or numbers, in whatever notation."""

MANY_LINES = 10
"""Minimum number of lines for conclusions from all lines, such as that a column numbers them."""


class Column(NamedTuple):
    """A column of a table, without its header."""

    name: str  # as messages show it
    lines: Sequence[int]  # in the file, counted from 1
    cells: list[str]


def numbers(path: Path | str, column: Column, alternative: str = "") -> np.ndarray:
    """Returns the numbers of a column, `float64[lines]`.

    Args:
        path: Source of the table, for errors.
        column: The column, without missing cells.
        alternative: End of an error message, after the fix of the cell.

    Raises:
        InputError: If a cell is not a finite number in float32.
    """
    # NaN fails the comparison, so its cell is wrong.
    found = [number_of(cell) for cell in column.cells]
    places = [
        place for place, number in enumerate(found) if number is None or not abs(number) <= _LARGEST
    ]
    if not places:
        return np.array(found, np.float64)
    # The message names the first wrong cell, and the fix depends on all of them.
    if not any(column.cells):
        raise faulty(
            path,
            f"has an empty column {column.name}",
            "remove it, or the comma at the end of each line",
        )
    wrong = [column.cells[place] for place in places]
    cell = wrong[0]
    line = column.lines[places[0]]
    more = f", and {len(wrong) - 1:,} more such cells" if len(wrong) > 1 else ""
    raise faulty(
        path,
        f"has {quoted(cell) if cell else 'an empty cell'} in line {line}, column {column.name}, "
        f"which is not a finite float32 number{more}",
        _way_out(wrong) + alternative,
    )


def check_precision(path: Path | str, column: Column, values: np.ndarray) -> float | None:
    """Compares the numbers of a column, `float64[lines]`, with their float32 roundings.

    Returns:
        The largest rounding error as a fraction of the standard deviation, if some distinct numbers
        are equal in float32; else None.

    Raises:
        InputError: If some distinct numbers are equal in float32, and the largest rounding error
            exceeds `COARSE` times the standard deviation.
    """
    # Compare in float64, unless it rounds the numbers of the column, too.
    rounded = values.astype(np.float32).astype(np.float64)
    largest = np.abs(values).max()
    deviation = values.std()
    if largest < _MOST_DIGITS and (deviation > NOISE * largest or len(set(column.cells)) == 1):
        error = np.abs(rounded - values).max()
        if len(np.unique(rounded)) == len(np.unique(values)):
            return None
        if error <= COARSE * deviation:
            return error / deviation

    # Compare exactly, relative to the least number, because float64 may round them, too.
    exact = [_exact(cell, value) for cell, value in zip(column.cells, values, strict=True)]
    least = min(exact)
    if len(set(exact)) == len(set(rounded)):
        return None
    deviation = np.array([float(number - least) for number in exact]).std()
    error = max(
        float(abs(Decimal(short) - number)) for short, number in zip(rounded, exact, strict=True)
    )
    if deviation and error <= COARSE * deviation:
        return error / deviation

    # Find two different numbers with the same rounding for the message.
    first: dict[float, int] = {}
    for place, short in enumerate(rounded):
        if exact[first.setdefault(short, place)] != exact[place]:
            one = quoted(column.cells[first[short]])
            other = quoted(column.cells[place])
            smallest = quoted(column.cells[exact.index(least)])
            raise faulty(
                path,
                f"has {one} and {other} in column {column.name}, which are equal in float32",
                f"subtract the minimum, {smallest}, from the column here and in later inputs of "
                "the model, or remove the column",
            )
    raise AssertionError("numbers were merged")


def counts_lines(values: np.ndarray) -> bool:
    """Returns whether `float64[lines]` counts `MANY_LINES` or more lines from 0 or 1."""
    count = np.arange(len(values))
    return len(values) >= MANY_LINES and (
        np.array_equal(values, count) or np.array_equal(values, count + 1)
    )


def is_identifier(name: str, values: np.ndarray) -> bool:
    """Returns whether a column of numbers, `float64[lines]`, probably holds identifiers.

    These are `MANY_LINES` or more distinct integers that increase, or in a column whose name ends
    in a word such as `id`, `key` or `number`.
    """
    if (
        len(values) < MANY_LINES
        or len(np.unique(values)) < len(values)
        or not np.array_equal(values, np.rint(values))
    ):
        return False
    # Matches `id` and `user_id`, but not `paid`.
    is_called_so = re.search(r"(^|[^a-z])(id|idx|index|key|no|nr|number|row)$", name.lower())
    return bool(is_called_so) or bool((np.diff(values) > 0).all())


def names_the_label(values: np.ndarray, labels: np.ndarray) -> bool:
    """Returns whether a column has exactly one number per class, different for all classes.

    It is False if there are fewer than `MANY_LINES` lines, or on average fewer than two per class.

    Args:
        values: Numbers of the column, `float64[lines]`.
        labels: Class indices, `int32[lines]`.
    """
    classes = len(np.unique(labels))
    # With few lines for each class, this may be a coincidence.
    if len(values) < max(MANY_LINES, 2 * classes) or len(np.unique(values)) != classes:
        return False
    return len(set(zip(values.tolist(), labels.tolist(), strict=True))) == classes


def _way_out(wrong: Sequence[str]) -> str:
    """Returns the fix for cells that are not numbers, as an imperative."""
    # Missing values and infinities are not words.
    words = [cell for cell in wrong if not is_missing(cell) and number_of(cell) is None]
    if not words and len(wrong) > 1:
        return "fill in the cells, or remove the lines or the column"
    # Kinds of cells that can be replaced by numbers.
    if words and all(re.fullmatch(DATE_LIKE, cell) for cell in words):
        return "write dates as 2024-01-31"
    if words and all(re.fullmatch(NUMBER_LIKE, cell) for cell in words):
        return "write numbers with decimal points, without thousands separators or decimal commas"
    return "correct the cell, or remove the line"


def _exact(cell: str, value: float) -> Decimal:
    try:
        return Decimal(cell)
    except InvalidOperation:  # of an exponent that Decimal does not take
        return Decimal(value)
