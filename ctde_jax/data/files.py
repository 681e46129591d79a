"""The user's own file: arrays that numpy saved, or a table in which each line is an example.

Arrays that are large stay in their file, where it holds their numbers as they are.
"""

import csv
import io
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from rich.filesize import decimal

from ctde_jax import memory
from ctde_jax.data.dataset import Dataset, from_arrays, standardized
from ctde_jax.data.disk import STREAMED_FROM, DiskArray, in_file, most_unpacked
from ctde_jax.errors import InputError, check_known, quoted, shortened
from ctde_jax.reading import open_regular

REQUIRED, OPTIONAL = ("x_train", "y_train"), ("x_test", "y_test")
Arrays: TypeAlias = dict[str, np.ndarray | DiskArray]
LARGEST = float(np.finfo(np.float32).max)


def from_npz(path: Path | str) -> Dataset:
    """Loads the arrays `x_train` and `y_train` of a .npz file, and `x_test` and `y_test` if it has them.

    Instead of a .npz file it may be a folder with `x_train.npy` and so on. What takes more than a gigabyte stays in its
    file and is read while training goes on, unless it is compressed; the notes say so. Nothing is ever unpickled.

    Raises:
        InputError: The file is no whole .npz file, or what it holds makes no data set.
    """
    path = Path(os.path.expanduser(path))
    arrays = _arrays_of_folder(path) if os.path.isdir(path) else _arrays(path)
    for name in ("y_train", "y_test"):
        if name in arrays and arrays[name].dtype.kind not in "iub":
            raise faulty(
                path,
                f"has labels of the type {arrays[name].dtype} in {name}",
                "save them as integers from 0, one for each class",
            )
    train, test = (arrays["x_train"], arrays["y_train"]), (arrays.get("x_test"), arrays.get("y_test"))
    try:
        dataset = from_arrays(*train, *test, name=path.stem)
    except InputError as error:
        raise InputError("data_file", f"names {path}, whose arrays make no data set: {error}") from error
    return replace(dataset, notes=(*_notes(arrays), *dataset.notes))


def _notes(arrays: Arrays) -> list[str]:
    """Says of large arrays whether they stay in their file."""
    sizes = {name: array.dtype.itemsize * math.prod(array.shape) for name, array in arrays.items()}
    return [
        f"{name} takes {decimal(sizes[name])}, and "
        + (
            "stays in its file, from which it is read while training goes on."
            if isinstance(array, DiskArray)
            else "was loaded, as it is compressed or stored by columns: numpy.savez of a contiguous array would not be."
        )
        for name, array in arrays.items()
        if sizes[name] >= STREAMED_FROM and array.ndim > 1
    ]


def from_csv(path: Path | str, label_column: str | None = None) -> Dataset:
    """Loads a table of numbers with one column of labels, and standardizes the features.

    The first line holds the column names if one of its feature cells is not a number. Labels may be words or
    numbers; sorted, they are the classes.

    Args:
        path: A CSV file in UTF-8.
        label_column: The name of the column that holds the labels; by default the last column.

    Raises:
        InputError: The file is no table, a feature is not a finite number, or there are not two classes.
    """
    path = Path(os.path.expanduser(path))
    table = _table(path, label_column)
    classes, labels = _classes(path, table)
    inputs = np.array([_features(path, table, row) for row in table.rows], np.float32)
    dataset = standardized(from_arrays(inputs, labels, name=path.stem, classes=classes))
    return replace(dataset, notes=(table.note, *dataset.notes))


def _arrays_of_folder(folder: Path) -> Arrays:
    paths = {name: folder / f"{name}.npy" for name in REQUIRED + OPTIONAL}
    missing = [paths[name].name for name in REQUIRED if not paths[name].is_file()]
    if missing:
        raise faulty(folder, f"is a folder without {' and '.join(missing)}", "save the arrays there with numpy.save")
    arrays = {}
    for name, path in paths.items():
        if path.is_file():
            with opened(path) as file, _reading(path, name):
                arrays[name] = _array(path, file, 0, path.stat().st_size)
    return arrays


def _arrays(path: Path) -> Arrays:
    with opened(path) as file, _archive(path, file) as archive:
        present = [member.removesuffix(".npy") for member in archive.namelist()]
        missing = [name for name in REQUIRED if name not in present]
        if missing:
            more = f" and {len(present) - _NAMED:,} more" if len(present) > _NAMED else ""
            raise faulty(
                path,
                f"lacks {' and '.join(missing)} and has {', '.join(present[:_NAMED]) or 'no array'}{more}",
                "save the arrays with numpy.savez(path, x_train=..., y_train=...)",
            )
        return {name: _member(path, file, archive, name) for name in REQUIRED + OPTIONAL if name in present}


def _archive(path: Path, file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # a malformed directory makes zipfile stumble in many ways
        raise faulty(
            path,
            f"is not a whole .npz file ({shortened(str(error))})",
            "save the arrays with numpy.savez, or copy it again",
        ) from error


def _member(path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str) -> np.ndarray | DiskArray:
    with _reading(path, name), archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        start = _start(file, info) if info.compress_type == zipfile.ZIP_STORED else None
        return _array(path, member, start, info.file_size)


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Returns where in a zip file the content of a member starts, after its header, its name and its extra field."""
    place = file.tell()
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(place)
    return member.header_offset + 30 + sum(lengths)


def _array(path: Path, content: IO[bytes], start: int | None, size: int) -> np.ndarray | DiskArray:
    """Reads an array, or leaves it on disk if it is large and its bytes are in the file as they are from `start` on.

    As numpy makes room for what the header says before it reads, the header is held against the size first.
    """
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"it is in version {version} of the format, which no array of numbers needs")
    if version == (2, 0) and int.from_bytes(content.read(4), "little") > _LONGEST_HEADER:
        raise ValueError("its header is longer than that of any array of numbers")
    content.seek(np.lib.format.MAGIC_LEN)
    shape, by_columns, dtype = _HEADERS[version](content)
    takes, there = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if not dtype.hasobject:
        if min(shape, default=0) < 0 or takes > size - content.tell() or (start is not None and size > there):
            raise EOFError("it is shorter than its header says")
        if start is None and takes > most_unpacked(there):
            raise ValueError(f"it would take {decimal(takes)} of memory, and the file takes {decimal(there)}")
        if start is None:
            memory.check("data_file", f"the numbers of an array in {path}", takes, "save fewer examples")
        if start is not None and takes >= STREAMED_FROM and not by_columns:
            array = in_file(path, start + content.tell(), dtype, shape)
            if array.offset + takes > there:
                raise EOFError("it is shorter than its header says")
            return array
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LONGEST_HEADER = 2**16
_NAMED = 10
"""Arrays that a sentence names at most."""


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a header that is Python in odd ways
            yield
    except Exception as error:  # malformed content makes zipfile, its decompressors and numpy stumble in many ways
        if "Object arrays" in str(error):
            raise faulty(
                path,
                f"has Python objects in {name}, which are never unpickled",
                "save a plain array of numbers, with examples of one shape",
            ) from error
        raise faulty(path, f"is damaged in {name} ({shortened(str(error))})", "save or copy the file again") from error


class _Row(NamedTuple):
    line: int  # in the file, counted from 1
    cells: list[str]


class _Table(NamedTuple):
    columns: list[str]  # as a sentence names them
    label: int
    rows: list[_Row]
    note: str


def _table(path: Path, label_column: str | None) -> _Table:
    rows = _rows(path)
    first = rows[0].cells
    label = first.index(label_column) if label_column in first else len(first) - 1
    has_header = any(_number(cell) is None for i, cell in enumerate(first) if i != label)
    if label_column is not None:
        if not has_header:
            raise InputError(
                "label_column",
                f"must name a column, got {label_column!r}, but {path} has no header line: add one, "
                "or put the labels into the last column and leave the option out.",
            )
        check_known("label_column", label_column, first)
    columns = [quoted(cell) if has_header else str(i + 1) for i, cell in enumerate(first)]
    if has_header:
        note = f"Line {rows[0].line} holds the column names; the labels are in the column {columns[label]}."
        rows = rows[1:]
    else:
        note = f"There is no line of column names; the labels are in the last column, {columns[label]}."
    if not rows:
        raise faulty(path, "has a header line and no examples", "add one line for each example")
    return _Table(columns, label, rows, note)


def _rows(path: Path) -> list[_Row]:
    rows, line = [], 1
    with opened(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
        check_size(content)
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                if cells:
                    rows.append(_Row(line, [cell.strip() for cell in cells]))
                line = reader.line_num + 1  # a quoted cell may go on over several lines
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise faulty(path, f"has the byte 0x{byte:02x}, which is not UTF-8", "save it in UTF-8") from error
        except csv.Error as error:
            raise faulty(path, f"is no CSV file at line {line} ({error})", "correct this line") from error
    if not rows:
        raise faulty(path, "is empty", "give a file with one line for each example")
    width = len(rows[0].cells)
    if width < 2:
        raise faulty(path, "has a single column", "separate the features and the label by commas")
    for row in rows:
        if len(row.cells) != width:
            raise faulty(
                path,
                f"has {len(row.cells)} cells in line {row.line} and {width} in line {rows[0].line}",
                "give every line the same number of cells",
            )
    return rows


def _features(path: Path, table: _Table, row: _Row) -> list[float]:
    features = []
    for i, cell in enumerate(row.cells):
        if i == table.label:
            continue
        number = _number(cell)
        if number is None or not abs(number) <= LARGEST:
            raise faulty(
                path,
                f"has {quoted(cell) if cell else 'an empty cell'} in line {row.line}, "
                f"column {table.columns[i]}, and not a finite float32 number",
                "correct the cell, or remove the line",
            )
        features.append(number)
    return features


def _classes(path: Path, table: _Table) -> tuple[tuple[str, ...], np.ndarray]:
    cells = [row.cells[table.label] for row in table.rows]
    column = table.columns[table.label]
    if "" in cells:
        line = table.rows[cells.index("")].line
        raise faulty(
            path,
            f"has an empty label in line {line}, column {column}",
            "fill in the cell, or remove the line",
        )
    numbers = [_number(cell) for cell in cells]
    words = any(number is None or not math.isfinite(number) for number in numbers)
    if not words and not all(float(number).is_integer() for number in numbers if number is not None):
        raise faulty(
            path,
            f"has labels such as {quoted(cells[0])} in column {column}, which are measurements and no classes",
            "name the column that holds the classes as the label column",
        )
    values: list[Any] = cells if words else numbers
    spelled = dict(zip(reversed(values), reversed(cells), strict=True))  # as it is in the first of its lines
    if len(spelled) < 2:
        raise faulty(path, f"has only the label {quoted(cells[0])} in column {column}", "give at least two classes")
    ordered = sorted(spelled)
    place = {value: number for number, value in enumerate(ordered)}
    return tuple(spelled[value] for value in ordered), np.array([place[value] for value in values])


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the user's file for reading; raises InputError if it is not a regular file or cannot be read."""
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # the latter for what no path can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise faulty(path, f"cannot be opened ({reason})", "give the path of a readable file") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise faulty(path, f"cannot be read ({error.strerror or error})", "copy the file again") from error


def check_size(file: BinaryIO) -> None:
    """Raises InputError for an open file that does not fit into memory."""
    memory.check("data_file", f"the bytes of {file.name}", os.fstat(file.fileno()).st_size, "give a smaller file")


def faulty(path: Path, fault: str, way_out: str) -> InputError:
    """Says what is wrong with the user's file, and the way out."""
    return InputError("data_file", f"names {path}, which {fault}: {way_out}.")
