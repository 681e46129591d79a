"""The recipe of a table: how the cells of a row become the inputs of the model.

It is fit on the training split (`data/kinds.py`), stored in the card of a bundle, and applied by
the trainer and by nodes, so that both compute the same inputs. Cells are text; `cell_of` converts
the values of data frames and of JSON.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ctde_jax.bundle.reading import number_of
from ctde_jax.errors import InputError

MISSING = ("", "na", "n/a", "<na>", "nan", "nat", "null", "none", "?", "-", "--", ".")
"""Spellings of a missing value in tables, in lower case."""

TRUE = ("true", "t", "yes", "y")
FALSE = ("false", "f", "no", "n")
"""Spellings of booleans, in lower case."""

Kind = Literal["number", "boolean", "category", "date"]

_WANTED: Mapping[Kind, str] = {
    "number": "a finite number",
    "boolean": "true or false",
    "category": "text",
    "date": "a valid date of the form",
}


class Unreadable(ValueError):
    """Raised if a cell is not of the kind of its column."""

    def __init__(self, column: "Column", row: int, cell: str):
        wanted = _WANTED[column.kind]
        # A pattern has zeros in place of digits; ISO 8601 uses letters.
        form = column.pattern
        for zeros, letters in (("0000-00-00", "YYYY-MM-DD"), ("00:00", "hh:mm"), (":00", ":ss")):
            form = form.replace(zeros, letters, 1)
        self.wanted = f"{wanted} {form}" if column.kind == "date" else wanted
        self.column = column.name
        self.row = row
        self.cell = cell
        super().__init__(f"{cell!r} in row {row} of {column.name} is not {self.wanted}")


class Column(NamedTuple):
    """Conversion of a column, fit on the training split."""

    name: str
    kind: Kind
    missing: int = 0
    """Number of training examples without a value."""

    median: float = 0.0
    """Number that replaces missing ones; of dates in days since 1970."""

    mean: float = 0.0
    deviation: float = 1.0
    """Numbers and dates are standardized by the mean and the standard deviation, in float64."""

    values: tuple[str, ...] = ()
    """Categories, in sorted order."""

    pattern: str = ""
    """Format of dates: the first one with zeros in place of its digits."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs of the model, in order."""
        if self.kind == "category":
            return (*(f"{self.name} is {value}" for value in self.values), f"{self.name} is other")
        return (self.name, *([f"{self.name} is missing"] if self.missing else []))

    @property
    def use(self) -> str:
        """Description of the inputs, for the plan of a run."""
        if self.kind == "category":
            return f"one-hot, {len(self.values):,} and others"
        indicator = ", gap indicator" if self.missing else ""
        return {
            "number": "standardized",
            "boolean": "0 or 1",
            "date": "days, standardized",
        }[self.kind] + indicator

    def encode(self, cells: Sequence[str]) -> np.ndarray:
        """Returns the inputs of the model, `float32[rows, features]`.

        Missing numbers and dates are replaced by the median, and missing booleans by 0. Unknown and
        missing categories have the last place.

        Raises:
            Unreadable: If a cell is not of the kind of this column.
        """
        if self.kind == "category":
            place = {value: number for number, value in enumerate(self.values)}
            found = [
                len(place) if is_missing(cell) else place.get(cell, len(place)) for cell in cells
            ]
            one_hot = np.zeros((len(cells), len(place) + 1), np.float32)
            one_hot[np.arange(len(cells)), found] = 1
            return one_hot
        values = numbers(self, cells)
        is_gap = np.isnan(values)
        values = np.where(is_gap, self.median, values)
        # Numbers beyond float32 become infinite, and models refuse these.
        with np.errstate(over="ignore"):
            scaled = ((values - self.mean) / self.deviation).astype(np.float32)
        parts = [scaled, is_gap] if self.missing else [scaled]
        return np.stack(parts, axis=1).astype(np.float32)


class Recipe(NamedTuple):
    """Conversion of the rows of a table to inputs of a model."""

    label: str
    """Name of the column of labels."""

    columns: tuple[Column, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs of the model, in order."""
        return tuple(name for column in self.columns for name in column.features)

    def encode(self, table: Mapping[str, Sequence[Any]] | Any) -> np.ndarray:
        """Returns the inputs of the model, `float32[rows, features]`.

        Args:
            table: Cells by name of the column, as text, numbers, booleans or dates, or None for a
                gap; such as a dictionary of lists, or a data frame. Other columns are ignored.

        Raises:
            InputError: If a column is missing.
            Unreadable: If a cell is not of the kind of its column.
        """
        missing = [each.name for each in self.columns if each.name not in table]
        if missing:
            names = ", ".join(map(repr, missing[:3])) + (" and more" if len(missing) > 3 else "")
            raise InputError(
                "table", f"must have the columns of the training table, but lacks {names}."
            )
        return np.concatenate(
            [each.encode([cell_of(value) for value in table[each.name]]) for each in self.columns],
            axis=1,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe as JSON, for the card of a bundle."""
        return {"label": self.label, "columns": [column._asdict() for column in self.columns]}


def parse_recipe(facts: Any) -> Recipe:
    """Returns the recipe of `Recipe.facts`.

    Raises:
        ValueError: If the facts are not those of a recipe.
    """
    try:
        columns = tuple(
            Column(**{**entry, "values": tuple(entry["values"])}) for entry in facts["columns"]
        )
        recipe = Recipe(facts["label"], columns)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("is not a recipe") from error
    for column in columns:
        texts = [column.name, column.pattern, *column.values]
        sizes = (column.median, column.mean, column.deviation, column.missing)
        if (
            column.kind not in get_args(Kind)
            or not all(isinstance(text, str) for text in texts)
            or not all(
                type(size) in (int, float) and abs(size) <= sys.float_info.max for size in sizes
            )
            or column.deviation <= 0
        ):
            raise ValueError(f"has an invalid column {column.name!r:.60}")
    if not columns or not isinstance(recipe.label, str):
        raise ValueError("has no columns or no label")
    return recipe


def is_missing(cell: str) -> bool:
    """Returns whether a cell marks a missing value."""
    return cell.lower() in MISSING


def numbers(column: Column, cells: Sequence[str]) -> np.ndarray:
    """Returns the numbers of a column that holds no categories, `float64[rows]`, NaN if missing.

    Raises:
        Unreadable: If a cell is not of the kind of the column.
    """
    parse = {
        "number": number_of,
        "boolean": truth_of,
        "date": lambda cell: days_of(cell) if _has_pattern(cell, column.pattern) else None,
    }[column.kind]
    values = np.full(len(cells), np.nan)
    largest = float(np.finfo(np.float32).max)
    for row, cell in enumerate(cells):
        if is_missing(cell):
            continue
        value = parse(cell)
        if value is None or not abs(value) <= largest:
            raise Unreadable(column, row, cell)
        values[row] = value
    return values


def truth_of(cell: str) -> float | None:
    """Returns 1 or 0 for a boolean, and None for other text."""
    word = cell.lower()
    return 1.0 if word in TRUE else 0.0 if word in FALSE else None


def days_of(cell: str) -> float | None:
    """Returns the days since 1970 of a date or a time in ISO 8601, and None for other text."""
    try:
        moment = datetime.fromisoformat(cell)
    except ValueError:
        return None
    zone = None if moment.tzinfo is None else UTC
    return (moment - datetime(1970, 1, 1, tzinfo=zone)) / timedelta(days=1)


def pattern_of(cell: str) -> str:
    """Returns a date with zeros in place of its digits, without fractions of seconds.

    The separator of date and time is `T`, also for a space.
    """
    return re.sub(r"\d", "0", re.sub(r"\.\d+", "", cell)).replace(" ", "T", 1)


def _has_pattern(cell: str, pattern: str) -> bool:
    """Returns whether a date has the pattern, if necessary without its time of 0:00."""
    day = re.sub(r"[T ]00:00(:00(\.0+)?)?$", "", cell)
    return pattern in (pattern_of(cell), pattern_of(day))


def cell_of(value: object) -> str:
    """Returns the text of a value of a data frame or of JSON, as a csv file has it.

    Whole numbers have no decimal point, because a data frame stores integers with gaps as floats.
    """
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return str(value).strip()
