"""Opens files that the user names, and parses the numbers and labels in them.

Only regular files are opened, since a pipe may block and a device may never end.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path

# In bytes.
_SMALL = 2**28
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        OSError: If the file cannot be opened or is not a regular file; `strerror` describes why.
    """
    # Check before opening, since opening a pipe without a writer blocks.
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(
            None, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path)
        )
    return open(path, "rb")


def read_small(path: Path | str) -> bytes:
    """Reads a whole regular file of at most 256 MiB, such as a configuration.

    Raises:
        OSError: If the file cannot be read, is not a regular file, or has more than 256 MiB.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _SMALL:
            raise OSError(None, f"it has more than {_SMALL:,} bytes", str(path))
        # With a limit, since some files of the operating system never end.
        return file.read(size)


def number_of(cell: str) -> float | None:
    """Parses a number of a table, which may be NaN or infinite; returns None for other text."""
    # `float` also accepts the underscores of Python source, such as 1_000.
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def separator_of(lines: Sequence[str]) -> str:
    """Returns the separator of the cells of a csv file: a comma, semicolon, tab or bar.

    It is not the comma if all lines contain another one, and commas do not divide the lines into
    the same number of cells, or the first cells are numbers with decimal commas.

    Args:
        lines: The first lines of the file.
    """
    # A quoted cell may contain any character.
    lines = [re.sub('"[^"]*"', "quoted", line) for line in lines if line.strip()]
    widths = {len(line.split(",")) for line in lines}
    for separator in (";", "\t", "|"):
        parts = [line.split(separator) for line in lines]
        has_decimal_commas = all(
            number_of(first.replace(",", ".")) is not None for first, *_ in parts
        )
        if min(map(len, parts), default=0) > 1 and (
            min(widths) < 2 or len(widths) > 1 or has_decimal_commas
        ):
            return separator
    return ","


def are_numbers(words: Sequence[str]) -> bool:
    """Returns whether all labels are finite numbers, and none has a leading zero, such as "007"."""
    numbers = [number_of(word) for word in words]
    return all(
        number is not None and math.isfinite(number) and not re.match(r"[-+]?0\d", word)
        for number, word in zip(numbers, words, strict=True)
    )


def finder(classes: Sequence[str]) -> Callable[[str], int | None]:
    """Returns a function from a label to the index of its class, or to None if it is no class.

    If all class names are numbers, labels are compared as numbers: "5.0" is the class "5".
    """
    key = number_of if are_numbers(classes) else str
    place = {key(name): number for number, name in enumerate(classes)}
    return lambda label: place.get(key(label))
