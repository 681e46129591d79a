"""Rows of a csv file, as text."""

import csv
import io
from itertools import islice
from pathlib import Path

from ctde_jax.bundle import Row, separator_of
from ctde_jax.data.files import check_size, faulty, not_utf8, opened

_SNIFFED = 10
"""Number of lines from which the separator is determined."""


def read_csv(path: Path) -> list[Row]:
    """Reads a csv file in UTF-8, with any separator that `separator_of` recognizes.

    Raises:
        InputError: If the file cannot be read, or is not a table with at least two columns.
    """
    rows = []
    line = 1
    # `utf-8-sig` skips a byte order mark; `newline=""` leaves line breaks within quotes to csv.
    with (
        opened(path) as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file,
    ):
        check_size(content)
        reader = csv.reader([])
        try:
            separator = separator_of([*islice(file, _SNIFFED)])
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                if cells:
                    rows.append(Row(line, [cell.strip() for cell in cells]))
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
