"""Rows of a csv file, as text."""

import csv
from pathlib import Path

from ctde_jax.bundle import Row, rows_of
from ctde_jax.data.files import check_size, faulty, not_utf8, opened


def read_csv(path: Path) -> list[Row]:
    """Reads a csv file by `rows_of`.

    Raises:
        InputError: If the file cannot be read, or is not a table with at least two columns.
    """
    with opened(path) as content:
        check_size(content)
        try:
            rows = rows_of(content)
        except UnicodeDecodeError as error:
            content.seek(0)
            raise not_utf8(
                path, content.read(8), f"has the byte 0x{error.object[error.start]:02x}"
            ) from error
        except csv.Error as error:
            raise faulty(path, f"is not valid CSV {error}", "correct this line") from error
    if not rows:
        raise faulty(path, "is empty", "pass a file with one line per example")
    _check_shape(path, rows)
    return rows


def _check_shape(path: Path, rows: list[Row]) -> None:
    """Raises InputError unless all lines have the same number of cells.

    There must be at least two columns, and the last one must not be empty.
    """
    width = len(rows[0].cells)
    wrong = next((row for row in rows if len(row.cells) != width), None)
    # A comment explains a different number of cells.
    if wrong is not None and (
        comment := next((row for row in rows[:2] if row.cells[0].startswith("#")), None)
    ):
        raise faulty(path, f"has a comment in line {comment.line}", "remove the line")
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
