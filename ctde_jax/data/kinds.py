"""Kinds of the columns of a table, and their conversion to inputs, fit on the training split."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ctde_jax.bundle import days_of, is_missing, number_of, recipe
from ctde_jax.data import columns
from ctde_jax.data.classes import FEW_CLASSES
from ctde_jax.data.columns import Column
from ctde_jax.data.dataset import moments
from ctde_jax.data.files import faulty
from ctde_jax.errors import InputError, quoted


def infer(path: Path | str, column: Column, is_category: bool) -> recipe.Kind:
    """Returns the kind of most cells of a column, or `category` if it is given.

    Cells of another kind are refused later, with their line: a typo in a number must not make a
    category of every number.

    Raises:
        InputError: If all cells are missing, or most are distinct words, such as names.
    """
    present = [cell for cell in column.cells if not is_missing(cell)]
    if not present:
        raise faulty(
            path,
            f"has no value in column {column.name}",
            "remove the column, or the comma at the end of each line, or name it in drop "
            f"(--drop {column.name})",
        )
    if is_category:
        return "category"
    if all(recipe.truth_of(cell) is not None for cell in present):
        return "boolean"
    if _are_most(present, lambda cell: number_of(cell) is not None):
        return "number"
    if _are_most(present, lambda cell: days_of(cell) is not None):
        return "date"
    # Numbers with decimal commas, and dates in another order: `columns.numbers` names the fix.
    like = f"{columns.NUMBER_LIKE}|{columns.DATE_LIKE}"
    if _are_most(present, lambda cell: re.fullmatch(like, cell) is not None):
        return "number"

    distinct = len(set(present))
    if distinct > FEW_CLASSES and len(present) < 2 * distinct:
        raise faulty(
            path,
            f"has {distinct:,} distinct words in the {len(present):,} cells of column "
            f"{column.name}, which look like names or texts, not categories",
            f"name it in drop (--drop {column.name}), or in categorical (--categorical "
            f"{column.name}) to use it",
        )
    return "category"


def numbers(path: Path | str, column: Column) -> np.ndarray:
    """Returns the numbers of a feature without gaps, `float64[lines]`.

    Raises:
        InputError: If a cell is not a finite number in float32.
    """
    return columns.numbers(
        path,
        column,
        f", or name it in categorical (--categorical {column.name}) if these are categories",
    )


def fit(
    path: Path | str, name: str, kind: recipe.Kind, column: Column, rows: np.ndarray
) -> recipe.Column:
    """Fits the conversion of a column.

    Args:
        path: Source of the table, for errors.
        name: Name of the column.
        kind: Kind of the column.
        column: Cells of all examples.
        rows: Indices of the training examples, `int64[training]`.

    Raises:
        InputError: If a cell is not of this kind, or no training example has a value.
    """
    cells = [column.cells[row] for row in rows.tolist()]
    present = [cell for cell in cells if not is_missing(cell)]
    if not present:
        raise faulty(
            path,
            f"has a value in column {column.name} in the test split only",
            f"name it in drop (--drop {column.name})",
        )
    missing = len(cells) - len(present)
    if kind == "category":
        return recipe.Column(name, kind, missing, values=tuple(sorted(set(present))))

    # Numbers of all examples, as an error must name a cell of the test split, too.
    pattern = recipe.pattern_of(_first_date(present)) if kind == "date" else ""
    fitted = recipe.Column(name, kind, missing, pattern=pattern)
    try:
        values = recipe.numbers(fitted, column.cells)[rows]
    except recipe.Unreadable as error:
        raise unreadable(path, column, error) from error
    if kind == "boolean":
        return fitted

    # Standardize after gaps are filled, as the model receives the median in place of a gap.
    median = float(np.nanmedian(values))
    mean, deviation = moments(np.where(np.isnan(values), median, values)[:, None])
    return fitted._replace(
        median=median, mean=float(mean.item()), deviation=float(deviation.item()) or 1.0
    )


def _are_most(cells: Sequence[str], is_one: Callable[[str], bool]) -> bool:
    return 2 * sum(map(is_one, cells)) > len(cells)


def _first_date(cells: Sequence[str]) -> str:
    return next((cell for cell in cells if days_of(cell) is not None), "")


def unreadable(path: Path | str, column: Column, error: recipe.Unreadable) -> InputError:
    """Returns the InputError for a cell that is not of the kind of its column."""
    # `columns.numbers` has the sentence for cells that are not numbers.
    if error.wanted == "a finite number":
        places = [place for place, cell in enumerate(column.cells) if not is_missing(cell)]
        lines = [column.lines[place] for place in places]
        numbers(path, Column(column.name, lines, [column.cells[place] for place in places]))
    return faulty(
        path,
        f"has {quoted(error.cell)} in line {column.lines[error.row]}, column {column.name}, which "
        f"is not {error.wanted}",
        "write all dates of the column in this format, or name it in categorical (--categorical "
        f"{column.name})",
    )
