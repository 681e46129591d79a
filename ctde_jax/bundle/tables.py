"""Reads raw rows of a table, from a csv file or from JSON lines, for a model with a recipe."""

import csv
import io
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ctde_jax.bundle.reading import separator_of
from ctde_jax.bundle.recipe import Recipe, Unreadable, cell_of
from ctde_jax.errors import InputError, quoted, shortened

STANDARD_INPUT = Path("-")
"""Name of the standard input, from which JSON lines are read."""

_SNIFFED = 10
"""Number of lines from which the separator is determined."""


class Row(NamedTuple):
    """A row of a table."""

    line: int  # in the file, counted from 1
    cells: list[str]


class Table(NamedTuple):
    """Rows of a table with named columns."""

    names: list[str]
    rows: list[Row]


def rows_of(content: BinaryIO) -> list[Row]:
    """Reads csv in UTF-8, with any separator that `separator_of` recognizes; skips empty lines.

    Raises:
        csv.Error: If a line is not valid; the message is `in line 3 (reason)`.
        UnicodeDecodeError: If the content is not UTF-8.
    """
    # `utf-8-sig` skips the byte order mark that spreadsheet programs write; `newline=""` leaves
    # line breaks within quotes to csv.
    file = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    rows = []
    line = 1
    try:
        separator = separator_of([*islice(file, _SNIFFED)])
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        for cells in reader:
            if cells:
                rows.append(Row(line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1  # a quoted cell may span several lines
    except csv.Error as error:
        raise csv.Error(f"in line {line} ({error})") from error
    finally:
        # Otherwise the wrapper would close the content.
        file.detach()
    return rows


def read_csv(path: Path) -> list[Row]:
    """Reads a csv file by `rows_of`.

    Raises:
        InputError: If the file is not a table.
    """
    try:
        with path.open("rb") as content:
            rows = rows_of(content)
    except csv.Error as error:
        raise faulty(path, f"is not valid CSV {error}", "correct this line") from error
    except (OSError, ValueError) as error:
        raise faulty(
            path, f"is not valid CSV in UTF-8 ({shortened(str(error))})", "correct it"
        ) from error
    if len({len(row.cells) for row in rows}) != 1:
        raise faulty(
            path,
            "has lines with different numbers of cells, or no lines",
            "give every line the same number of cells",
        )
    return rows


def read_table(path: Path) -> Table:
    """Reads a .csv file, a .jsonl file, or JSON lines from the standard input.

    Raises:
        InputError: If the file has another format, cannot be read, or has no rows.
    """
    if path.suffix.lower() == ".csv":
        header, *rows = read_csv(path)
        table = Table(header.cells, rows)
    elif path == STANDARD_INPUT:
        table = _of_json(path, sys.stdin)
    elif path.suffix.lower() == ".jsonl":
        try:
            table = _of_json(path, path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise faulty(path, f"cannot be read ({shortened(str(error))})", "correct it") from error
    else:
        raise InputError(
            "input",
            "must be a .csv or .jsonl file of rows, or - for JSON lines from standard input, as "
            f"the model reads a table, got {quoted(str(path))}.",
        )
    if not table.rows:
        raise faulty(path, "has no rows", "add one line per example, after a header in a csv file")
    return table


def encode(path: Path, table: Table, recipe: Recipe) -> np.ndarray:
    """Returns the inputs of the model, `float32[rows, features]`.

    Raises:
        InputError: If a column is missing, or a cell is not of the kind of its column.
    """
    cells = {column.name: cells_of(path, table, column.name) for column in recipe.columns}
    try:
        return recipe.encode(cells)
    except Unreadable as error:
        raise faulty(
            path,
            f"has {quoted(error.cell)} in line {table.rows[error.row].line}, column "
            f"{quoted(error.column)}, which is not {error.wanted}",
            "correct the cell, or leave it empty",
        ) from error


def cells_of(path: Path, table: Table, name: str) -> list[str]:
    """Returns the cells of a column.

    Raises:
        InputError: If there is no such column, or there are several.
    """
    if table.names.count(name) != 1:
        count = "no" if name not in table.names else "more than one"
        raise faulty(
            path,
            f"has {count} column {quoted(name)}",
            "name its columns like those of the training table",
        )
    place = table.names.index(name)
    return [row.cells[place] for row in table.rows]


def faulty(path: Path, fault: str, way_out: str) -> InputError:
    """Returns the InputError for a file of inputs.

    Args:
        path: Path of the file.
        fault: Description of the fault, as a predicate of the path.
        way_out: Remedy, as an imperative.
    """
    return InputError("input", f"{path} {fault}; {way_out}.")


def _of_json(path: Path, texts: Iterable[str]) -> Table:
    """Parses one JSON object per line; all must have the keys of the first one."""
    names: list[str] = []
    rows = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise faulty(
                path, f"has no valid JSON in line {number}", "write one object per line"
            ) from error
        if not isinstance(row, dict) or any(isinstance(cell, dict | list) for cell in row.values()):
            raise faulty(
                path,
                f"has no object of text and numbers in line {number}",
                "write one object per line, with the names of the columns as keys",
            )
        names = names or list(row)
        if row.keys() != {*names}:
            differing = sorted(row.keys() ^ {*names})
            raise faulty(
                path,
                f"has other keys in line {number} than before, such as {quoted(differing[0])}",
                "give every object the same keys, with null for a missing value",
            )
        rows.append(Row(number, [cell_of(row[name]) for name in names]))
    return Table(names, rows)
